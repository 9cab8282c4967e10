"""Plain data as lines and pages for a person."""
