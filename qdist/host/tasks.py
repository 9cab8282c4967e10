"""Runs what needs torch in a child process: a request goes in, its result or error comes out."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import msgspec

from qdist.core.errors import JobError
from qdist.core.planning.plan import Prepared
from qdist.core.planning.render import PASSIVE
from qdist.core.requests import Answer, Prepare, PrepareModel, Request
from qdist.core.spec.run_spec import RunSpec
from qdist.host import children
from qdist.host.machine import probe
from qdist.host.terminal import BROKEN_PIPE

ENTRY = "qdist.runtime.tasks"
"""The module that answers requests in the child process."""


class Task(NamedTuple):
    """A request that is ready for a child process."""

    command: list[str]
    descriptors: tuple[int, int]
    """Descriptors to pass on to the process: one to read the request from, one to write the answer to."""
    told: BinaryIO

    def answer(self) -> Answer | None:
        """The process's answer; None if it ended without one."""
        self.told.seek(0)
        content = self.told.read()
        return msgspec.json.decode(content, type=Answer) if content else None


@contextmanager
def handed_over(request: Request) -> Iterator[Task]:
    """A request in unnamed in-memory files, so that a kill leaves nothing behind."""
    with os.fdopen(os.memfd_create("request"), "w+b") as given, os.fdopen(os.memfd_create("answer"), "w+b") as told:
        given.write(msgspec.json.encode(request))
        given.flush()
        descriptors = (given.fileno(), told.fileno())
        command = [sys.executable, "-P", "-m", ENTRY, type(request).__name__, *map(str, descriptors)]
        yield Task(command, descriptors, told)


def run_task(request: Request, *, device: str | None = None) -> Prepared | None:
    """`ask` for a job whose answer is what was prepared, or nothing."""
    return ask(request, device=device).prepared


def ask(request: Request, *, device: str | None = None) -> Answer:
    """Run a job in a child process on this terminal; returns its answer.

    device: 'cuda' or 'cpu' where the machine has been probed already.
    Raises the QdistError that the process ended with; KeyboardInterrupt, with what the user should know, once it has
    ended by Ctrl-C; JobError when a signal or a bug ended it.
    """
    environment = children.environment()
    if (device or probe.cluster().device) == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, once imported, warns that it found no GPU
        environment.setdefault("OMP_WAIT_POLICY", PASSIVE)
    with handed_over(request) as task:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if request.asks else None
        try:
            code = children.run(
                task.command,
                environment,
                asks=request.asks,
                pass_fds=task.descriptors,
                passes_on_sigterm=request.passes_on_sigterm,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(request.when_stopped) from None
        finally:
            if request.asks:
                signal.signal(signal.SIGINT, before)
        answer = task.answer()
    if answer is None and code == BROKEN_PIPE:
        raise SystemExit(code)
    if answer is None:
        raise JobError(
            f"the process that was at work ended with exit code {code}",
            try_="the same command again; what it said is above",
        )
    if error := answer.error:
        raise error
    return answer


def prepare(spec: RunSpec, *, device: str | None = None) -> Prepared:
    """Convert, repair and tokenize in a child process, which keeps the launcher free of torch."""
    return _prepared(Prepare(spec=spec), device)


def prepare_model(spec: RunSpec, *, device: str | None = None) -> Prepared:
    """The same for a model without data."""
    return _prepared(PrepareModel(spec=spec), device)


def _prepared(request: Prepare | PrepareModel, device: str | None) -> Prepared:
    prepared = run_task(request, device=device)
    if prepared is None:
        raise JobError("nothing was prepared", try_="the same command again")
    return prepared
