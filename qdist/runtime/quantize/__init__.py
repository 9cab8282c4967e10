"""From 16-bit weights to packed ones."""
