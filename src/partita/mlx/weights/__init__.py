"""Weights and the optimizer's state, from and to the unsplit checkpoint."""
