"""Where the backbone of a group lies."""
