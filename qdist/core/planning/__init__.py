"""From the user's settings and the machine to every decision of a run. Pure."""
