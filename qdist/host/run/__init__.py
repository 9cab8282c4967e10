"""Run directories: written, followed, watched, listed."""
