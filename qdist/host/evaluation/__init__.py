"""Evaluations that need no model of ours: judges behind an address, ratings, files of predictions."""
