"""Finding models by name, and reading what their folders hold."""
