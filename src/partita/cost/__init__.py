"""What a plan costs on a machine: bytes of each rank, seconds of each step. Pure Python, no framework."""
