"""The models of mlx-lm, unsplit and split: how they are built, and where their parts are placed."""
