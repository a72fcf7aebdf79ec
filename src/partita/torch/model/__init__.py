"""The models of transformers, unsplit and split: how they are built, and where their parts are placed."""
