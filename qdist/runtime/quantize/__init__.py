"""Packing 16-bit weights."""
