"""Who holds which ranges of each tensor."""
