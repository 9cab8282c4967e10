"""Whole layers on each GPU: a rank a stage, or one process over several GPUs."""
