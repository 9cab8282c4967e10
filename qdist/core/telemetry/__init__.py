"""What a run reports, and what is derived from it: history, warnings, reports."""
