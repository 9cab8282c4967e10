"""Ways to place a backbone on the GPUs of a group, each in a module of its own, behind the promises of `base`."""
