"""Whole layers on each GPU: one rank per stage, or one process over several GPUs."""
