"""A split model compared with the unsplit one."""
