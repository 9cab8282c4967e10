"""Formats of records, and the demo's data."""
