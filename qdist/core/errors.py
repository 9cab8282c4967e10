"""What qdist raises when the user, not the program, can put it right.

    QdistError
    ├── SpecError      a setting is unknown, malformed or contradicts another
    ├── ModelError     the model cannot be found, read or used as asked
    ├── DataError      a data file or record cannot be used
    ├── PlanError      the job does not fit the machine
    ├── RunError       a run directory, checkpoint or adapter is not what it must be
    │   └── JobError   a run or another job was started, and failed
    └── MachineError   a package, driver or device is missing

Each carries one sentence that says what is wrong, with numbers, and one thing to try. Anything else that
escapes is a bug and keeps its traceback.

Exit codes of every command: 0 done; 1 a run or a job failed (JobError, or a bug); 2 the user asked for something that
cannot be (all others); 130 Ctrl-C.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from qdist.core.changes import Change, flags


class QdistError(Exception):
    """A problem that the user can put right. `try_` is the one thing to try, or empty."""

    exit_code: ClassVar[int] = 2
    """Of a command that ends with it."""

    def __init__(self, message: str, *, try_: str = "", ways: Sequence[Change] = ()) -> None:
        """ways: changes to what was asked that may put it right, the likeliest first; `hints` tries them."""
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
    """A run directory, a checkpoint or an adapter is not what it must be."""


class JobError(RunError):
    """A run or another job was started, and failed: a rank died, a disk or GPU ran full, the loss is NaN."""

    exit_code = 1


class MachineError(QdistError):
    """A package, driver or device is missing."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, or None when nothing is close."""
    from difflib import get_close_matches

    folded = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    close = get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None
