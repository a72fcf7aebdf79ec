"""Training data: files to records, to ids on disk, to the rows of a step, the same on every mesh and engine.

files -> records -> encode -> store -> rows, packing -> order, samples;  given: data that a caller passes from Python
"""

from partita.training.data.order import order, row_starts

__all__ = ["order", "row_starts"]
