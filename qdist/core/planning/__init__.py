"""From what the user wants and what is there to every decision of a run. Pure."""
