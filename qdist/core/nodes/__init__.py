"""Runs of several machines: who takes part, what must agree, who goes on after a failure. Pure."""
