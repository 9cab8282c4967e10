"""One machine's part in a run of several: rendezvous by torch's elastic c10d backend, generations of ranks."""
