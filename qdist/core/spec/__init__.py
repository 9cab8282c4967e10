"""The user's keys: values, contradictions, nearest names."""
