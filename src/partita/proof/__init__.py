"""What both engines need to prove that a split model equals the unsplit one."""
