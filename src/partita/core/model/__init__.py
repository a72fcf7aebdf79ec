"""Facts of a model without a framework: its tensors, its config, its families."""
