"""What this machine is, and its hardware."""
