"""The layout language: which layers each pipeline stage runs."""
