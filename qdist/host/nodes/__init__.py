"""Machines of a run from one of them: hosts files, ssh, the run's token, its gate and the files behind it."""
