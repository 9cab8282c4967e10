"""Runs one of qdist's torch-side modules in a process of its own, with its errors as our errors."""

import os
import sys
from collections.abc import Sequence

import msgspec

from qdist.core import errors
from qdist.core.planning.plan import Prepared
from qdist.core.planning.render import PASSIVE
from qdist.core.spec.spec import RunSpec
from qdist.host import children
from qdist.host.machine import probe


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How preparing ended: with what was prepared, or an error of the user's to mend."""

    prepared: Prepared | None = None
    kind: str = ""
    """Name of a class of `qdist.core.errors`."""
    message: str = ""
    try_: str = ""


def prepare(spec: RunSpec) -> Prepared:
    """Convert, repair and tokenize in a separate process, so that the launcher stays free of torch.

    Raises whatever QdistError the process ended with.
    """
    # Files in memory, without a name: a kill leaves nothing behind.
    with os.fdopen(os.memfd_create("spec"), "w+b") as given, os.fdopen(os.memfd_create("prepared"), "w+b") as told:
        given.write(msgspec.json.encode(spec))
        given.flush()
        descriptors = (given.fileno(), told.fileno())
        code = run_module("qdist.runtime.train.prepare", tuple(map(str, descriptors)), pass_fds=descriptors)
        told.seek(0)
        answer = told.read()
    if not answer:
        raise errors.JobError(
            f"preparing model and data ended with exit code {code}",
            try_="the same command again; what it said is above",
        )
    outcome = msgspec.json.decode(answer, type=Outcome)
    if outcome.prepared is None:
        raise getattr(errors, outcome.kind)(outcome.message, try_=outcome.try_)
    return outcome.prepared


def run_module(module: str, arguments: Sequence[str], *, asks: bool = False, pass_fds: Sequence[int] = ()) -> int:
    """Run a module's `main` in a process of its own, on this terminal; its exit code.

    asks, pass_fds: as `children.run` has them.
    Raises KeyboardInterrupt once it has ended by Ctrl-C, JobError when a signal killed it.
    """
    environment = children.environment()
    if probe.cluster().device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, once imported, warns that it found no GPU
        environment.setdefault("OMP_WAIT_POLICY", PASSIVE)
    command = [sys.executable, "-P", "-m", "qdist.runtime.child", module, *arguments]
    return children.run(command, environment, asks=asks, pass_fds=pass_fds)
