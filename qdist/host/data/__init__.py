"""Records from files, folders and the hub."""
