"""Models by name, and what their folders hold."""
