"""What is done to qdist that it must survive; each module a command: `python -m bench.chaos.NAME` in this checkout."""
