"""Run directories: writing, following, watching and listing them."""
