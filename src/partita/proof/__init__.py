"""The proof that a split model equals the unsplit one: the parts that both engines share."""
