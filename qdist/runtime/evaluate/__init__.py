"""Tasks that measure a model, on every placement."""
