"""The ranges of each tensor that each rank holds."""
