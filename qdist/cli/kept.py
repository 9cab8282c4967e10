"""Runs a job that keeps what it has done when it is stopped."""

from collections.abc import Sequence

from qdist.host.launch.tasks import run_module
from qdist.host.terminal import say


def run_kept(module: str, arguments: Sequence[str]) -> int:
    """As `run_module`; after Ctrl-C it says that the same command goes on, and the exit code is 130."""
    try:
        return run_module(module, arguments)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from what is written", err=True)
        return 130
