"""What a run says of itself, and what is made of it: history, warnings, reports."""
