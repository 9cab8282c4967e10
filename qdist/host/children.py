"""Processes that are started here, do not outlive this one, and of which it is known how they ended."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from qdist.core.errors import JobError

_PATIENCE_S = 5.0
"""For a child that was asked to end, before it is asked with more force."""
_USUAL: Mapping[int, str] = {
    signal.SIGKILL: ", which is what Linux does to a process when memory runs out",
    signal.SIGPROF: ", which ends a chat template that nothing else could stop",
}
"""What a signal is mostly sent for."""
_INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """In a child, also before it becomes another program: the kernel sends it a signal when its parent dies (Linux)."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, by)


def hear_ctrl_c() -> None:
    """In a child that `run` started: from now on it is interrupted, and at once where it was meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin() -> None:
    """Keep Ctrl-C back while an interpreter starts, or it answers with a traceback that nothing can catch."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def run(command: Sequence[str], environment: Mapping[str, str], *, asks: bool = False) -> int:
    """Run a program on this terminal to its end; its exit code. It is deaf to Ctrl-C until it calls `hear_ctrl_c`.

    asks: it reads what is typed. Otherwise its standard input is closed: no library can wait there for an answer.
    Raises KeyboardInterrupt once it has ended by Ctrl-C, JobError when a signal killed it.
    """
    stdin = None if asks else subprocess.DEVNULL
    child = subprocess.Popen(command, env=environment, stdin=stdin, preexec_fn=_begin)
    try:
        code = child.wait()
    except KeyboardInterrupt:  # of the terminal, which the child has heard as well
        _end(child)
        raise
    if code in (_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code < 0:
        raise JobError(f"the process that was at work {killed_by(-code)}", try_="the same command again")
    return code


def killed_by(number: int) -> str:
    """'was killed by SIGTERM', and of others who usually does."""
    return f"was killed by {signal.Signals(number).name}{_USUAL.get(number, '')}"


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        for force in (child.terminate, child.kill):
            try:
                child.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                force()
        child.wait()
    finally:  # Ctrl-C again
        child.kill()
