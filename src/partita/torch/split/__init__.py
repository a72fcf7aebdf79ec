"""A plan applied to a model."""
