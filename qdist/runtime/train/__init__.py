"""One rank of a run, from preparing to its result."""
