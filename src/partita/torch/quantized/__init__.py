"""Weights that stay quantized in memory, and products with them."""
