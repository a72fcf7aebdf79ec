"""The bench: Partita beside its peers, in one interleaved run. `python -m bench`."""
