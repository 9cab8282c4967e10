"""Checkpoints of Sparsebit's alpaca-qlora."""
