"""The HTTP side of serving: it runs beside the step loop on one rank, and never calls a collective."""
