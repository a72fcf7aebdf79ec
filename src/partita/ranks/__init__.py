"""The processes of a run: start, rendezvous, and the detection of lost ranks. The engines have the collectives."""
