"""Quantized weights: which tensors of a checkpoint make up one, and any part of it in one common form. Needs no framework."""
