"""Weights and optimizer state, read from and written to the unsplit checkpoint."""
