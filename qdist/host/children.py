"""Processes that are started here, do not outlive this one, and of which it is known how they ended."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qdist.core.errors import JobError
from qdist.core.machine.environment import for_children

_PATIENCE_S = 5.0
"""For a child that was asked to end, before it is asked with more force."""
_USUAL: Mapping[int, str] = {
    signal.SIGKILL: ", which is what Linux does to a process when memory runs out",
    signal.SIGPROF: ", which ends a chat template that nothing else could stop",
}
"""What a signal is mostly sent for."""
_INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


def end_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """In a child, also before it becomes another program: the kernel sends it a signal when its parent dies (Linux).

    parent: process id of who started it. One that died before the kernel was asked sends none: then it ends here.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, by)
    if os.getppid() != parent:
        os._exit(128 + by)


def ending_with_this() -> Callable[[], None]:
    """For `preexec_fn`: the program that is started ends with this process."""
    parent = os.getpid()
    return lambda: end_with_parent(parent)


def environment(**more: str) -> dict[str, str]:
    """What a Python that is started here gets: this process's environment as `for_children` leaves it, and `more`."""
    root = str(Path(__file__).resolve().parents[2])
    # `python -m qdist` in a checkout finds the package in its working directory alone, where no child looks.
    only_here = root not in sys.path[1:] and bool(sys.path) and os.path.realpath(sys.path[0]) == root
    return for_children(os.environ, root=root if only_here else "") | more


def hear_ctrl_c() -> None:
    """In a child that `run` started: from now on it is interrupted, and at once where it was meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _beginning() -> Callable[[], None]:
    """Keep Ctrl-C back while an interpreter starts, or it answers with a traceback that nothing can catch."""
    bind = ending_with_this()

    def begin() -> None:
        bind()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    return begin


def run(
    command: Sequence[str], environment: Mapping[str, str], *, asks: bool = False, pass_fds: Sequence[int] = ()
) -> int:
    """Run a program on this terminal to its end; its exit code. It is deaf to Ctrl-C until it calls `hear_ctrl_c`.

    asks: it reads what is typed. Otherwise its standard input is closed: no library can wait there for an answer.
    pass_fds: descriptors that it shares with this process, beside its standard streams.
    Raises KeyboardInterrupt once it has ended by Ctrl-C, JobError when a signal killed it.
    """
    stdin = None if asks else subprocess.DEVNULL
    child = subprocess.Popen(command, env=environment, stdin=stdin, preexec_fn=_beginning(), pass_fds=pass_fds)
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
