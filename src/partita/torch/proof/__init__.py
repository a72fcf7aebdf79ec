"""Comparison of a split model with the unsplit one."""
