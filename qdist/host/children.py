"""Child processes that end with their parent, and their exit status."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from qdist.core.errors import JobError
from qdist.core.machine.environment import for_children

_PATIENCE_S = 5.0
"""Seconds that a child gets to end before it is asked with more force."""
_USUAL: Mapping[int, str] = {
    signal.SIGKILL: ", which is what Linux does to a process when memory runs out",
    signal.SIGPROF: ", which ends a chat template that nothing else could stop",
}
"""The usual cause of a signal, by its number."""
ENDED_BY = signal.SIGTERM
"""What `run_together` ends programs with whose company has failed."""
_TICK_S = 0.3
"""Seconds between two looks at programs that run side by side."""
_INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


def end_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel signal this child process when its parent dies (Linux); the setting survives exec.

    parent: process id of who started it. One that died before the kernel was asked sends none: then it ends here.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, by)
    if os.getppid() != parent:
        os._exit(128 + by)


def ending_with_this() -> Callable[[], None]:
    """A `preexec_fn` that makes the started program end with this process."""
    parent = os.getpid()
    return lambda: end_with_parent(parent)


def environment(**more: str) -> dict[str, str]:
    """The environment for a child Python: this process's environment as `for_children` leaves it, and `more`."""
    root = str(Path(__file__).resolve().parents[2])
    # `python -m qdist` in a checkout finds the package in its working directory alone, where no child looks.
    only_here = root not in sys.path[1:] and bool(sys.path) and os.path.realpath(sys.path[0]) == root
    return for_children(os.environ, root=root if only_here else "") | more


def hear_ctrl_c() -> None:
    """Accept Ctrl-C again in a child that `run` started; one that came in the meantime takes effect at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _beginning() -> Callable[[], None]:
    """Block Ctrl-C while an interpreter starts, when it would print a traceback that nothing can catch."""
    bind = ending_with_this()

    def begin() -> None:
        bind()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    return begin


def run(
    command: Sequence[str], environment: Mapping[str, str], *, asks: bool = False, pass_fds: Sequence[int] = (),
    passes_on_sigterm: bool = False,
) -> int:  # fmt: skip
    """Run a program on this terminal until it ends; its exit code. It ignores Ctrl-C until it calls `hear_ctrl_c`.

    asks: it reads what is typed. Otherwise its standard input is closed: no library can wait there for an answer.
    pass_fds: descriptors that it shares with this process, beside its standard streams.
    passes_on_sigterm: SIGTERM does not end this process but is sent on to the program, whose end is waited for.
    Raises KeyboardInterrupt once it has ended by Ctrl-C, JobError when a signal killed it.
    """
    stdin = None if asks else subprocess.DEVNULL
    child = subprocess.Popen(command, env=environment, stdin=stdin, preexec_fn=_beginning(), pass_fds=pass_fds)
    try:
        with _passed_on(child) if passes_on_sigterm else nullcontext():
            code = child.wait()
    except KeyboardInterrupt:  # of the terminal, which the child has heard as well
        _end(child)
        raise
    if code in (_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code < 0:
        raise JobError(f"the process that was at work {killed_by(-code)}", try_="the same command again")
    return code


class Start(NamedTuple):
    """A program to start."""

    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: Sequence[int] = ()


def run_together(starts: Sequence[Start], *, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
    """Run programs side by side until all have succeeded or one has failed, which ends the others; their exit codes.

    They hear Ctrl-C as those of `run` do, and read no input. meanwhile: called while they run, a few times a second.
    """
    with ExitStack() as stack:
        running = []
        for own in starts:
            child = subprocess.Popen(
                own.command, env=own.environment, stdin=subprocess.DEVNULL, preexec_fn=_beginning(),
                pass_fds=own.pass_fds,
            )  # fmt: skip
            stack.callback(_stop, child)
            running.append(child)
        codes: list[int | None] = [None for _ in running]
        while None in codes and not any(codes):
            with suppress(subprocess.TimeoutExpired):
                running[codes.index(None)].wait(_TICK_S)
            codes = [child.poll() for child in running]
            meanwhile()
    return [child.wait() for child in running]


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        _end(child)


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def killed_by(number: int) -> str:
    """'was killed by SIGTERM', with the usual cause of the signal if it has one."""
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
