"""Gradients, optimizer steps and the objective."""
