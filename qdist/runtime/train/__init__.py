"""One rank of a run, from preparation to result."""
