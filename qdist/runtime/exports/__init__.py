"""Exports of a run: its adapter merged, widened, or in another format."""
