"""Batches, objective, optimizer and gradient reduction of a training step."""
