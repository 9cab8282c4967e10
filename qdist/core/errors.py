"""What qdist raises when the user, not the program, can put it right.

    QdistError         exit code
    ├── SpecError      2  a setting or flag is unknown, malformed or contradicts another
    ├── ModelError     2  the model cannot be found, read or used as asked
    ├── DataError      2  a data file or record cannot be used
    ├── PlanError      2  the job does not fit the machine
    ├── RunError       2  a run directory, checkpoint or adapter is not what it must be
    │   └── JobError   1  a run or another job was started, and failed
    └── MachineError   2  a package, driver or device is missing

Each carries one sentence that says what is wrong, with numbers, and one thing to try. Anything else that
escapes is a bug and keeps its traceback.

Exit codes of every command, wherever the error is found, also in a process that the command started: 0 done; 1 a run or
a job failed (JobError, or a bug); 2 the user asked for something that cannot be; 130 Ctrl-C.

How does one type a change to what was asked?
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

Change = Mapping[str, Any]
"""Settings by dotted key, and flags of `qdist plan` that describe a machine: 'gpu_memory': '48GiB'. None leaves a
setting to the plan."""
Say = Callable[[Change], str]

MACHINE = ("gpu_memory", "gpu_name", "host_memory", "nodes", "network")
"""Flags of `qdist plan` that describe a machine; they are not settings."""
QUESTIONS = ("batch", "context", "adapters")
"""Flags of `qdist plan --for inference` that are not settings."""
_FLAGS = frozenset((
    "model", "method", "bits", "gpus", "placement", "gpus_per_group", "max_memory", *MACHINE, *QUESTIONS
))  # fmt: skip
"""Keys that have a flag of their name."""
_OTHER_FLAGS = {"data.path": "data", "data.eval": "eval_data"}
_REMARKS = {"train.answers": "(and qdist generate RUN afterwards)"}


def flag_of(name: str) -> str:
    """The flag of a command's parameter: '--seq-len'."""
    return f"--{name.replace('_', '-')}"


def typed(key: str, value: object) -> str:
    """A setting as typed: '--bits 4', '--set lora.r=16', '--placement auto'."""
    text = value_text(value)
    if key in _FLAGS or key in _OTHER_FLAGS:
        return f"{flag_of(_OTHER_FLAGS.get(key, key))} {shlex.quote(text)}"
    return f"--set {shlex.quote(f'{key}={text}')}"


def value_text(value: object) -> str:
    """The value of a setting as typed."""
    if value is None or isinstance(value, bool):
        return {None: "auto", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


def flags(change: Change) -> str:
    """A change as typed after the command that it changes."""
    words = [typed(key, value) for key, value in change.items()]
    return " ".join(words + [remark for key, remark in _REMARKS.items() if key in change])


def in_words(change: Change) -> str:
    """A change for someone who has the machine that the plan is for: another one has no flags."""
    own = flags({key: value for key, value in change.items() if key not in MACHINE})
    machine = []
    if "gpu_memory" in change:
        machine.append(f"GPUs of {spaced(change['gpu_memory'])}")
    if "host_memory" in change:
        host = change["host_memory"]
        machine.append(f"{spaced(host)} of host memory, which qdist plan --host-memory {host} assumes")
    return " with ".join(filter(None, (" and ".join(machine), own)))


def spaced(amount: str) -> str:
    """'48GiB' -> '48 GiB'."""
    return amount.replace("GiB", " GiB")


class QdistError(Exception):
    """A problem that the user can fix. `try_` is the one thing to try, or empty."""

    exit_code: ClassVar[int] = 2
    """Exit status of a command that ends with this error."""

    def __init__(self, message: str, *, try_: str = "", ways: Sequence[Change] = ()) -> None:
        """ways: changes to the request that may fix it, the likeliest first; `hints` tries them."""
        super().__init__(message)
        self.message = message
        self.try_ = try_ or (flags(ways[0]) if ways else "")
        self.ways = tuple(ways)

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.try_}" if self.try_ else self.message


class SpecError(QdistError):
    """A setting is unknown, malformed or contradicts another."""


class ModelError(QdistError):
    """The model cannot be found, read or used as asked."""


class DataError(QdistError):
    """A data file or a record in it cannot be used."""


class PlanError(QdistError):
    """The job does not fit the machine."""


class RunError(QdistError):
    """A run directory, a checkpoint or an adapter is invalid."""


class JobError(RunError):
    """A run or another job failed after its start: a rank died, a disk or GPU ran full, the loss is NaN."""

    exit_code = 1


class MachineError(QdistError):
    """A package, driver or device is missing."""


def nearest(name: str, known: Iterable[str], *, alike: float = 0.5) -> str | None:
    """The known name closest to a mistyped one, or None when nothing is close.

    alike: the share of the characters of both names that must be the same, in order.
    """
    from difflib import get_close_matches

    folded = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    close = get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=alike)
    return folded[close[0]] if close else None
