"""Communicators, groups of ranks, and collectives with gradients."""
