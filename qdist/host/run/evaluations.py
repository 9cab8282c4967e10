"""What was measured of a run's models: a line an evaluation, in the run's own folder."""

import os
from pathlib import Path

import msgspec

from qdist.core.errors import RunError
from qdist.core.evaluation.results import Evaluation
from qdist.host.files import locked, unwritable
from qdist.host.opening import decoded, read_bytes

NAME = "evaluations.jsonl"


def read_evaluations(run: Path) -> tuple[Evaluation, ...]:
    """The evaluations of a run, the first first; a line that a kill left unterminated is not read.

    Raises RunError for a file that holds anything else.
    """
    path = run / NAME
    lines = read_bytes(path, RunError).split(b"\n")[:-1] if path.exists() else []
    away = "take the file out of the run"
    return tuple(
        decoded(line, Evaluation, f"{path}, line {n}", RunError, try_=away) for n, line in enumerate(lines, 1) if line
    )


def add_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Append an evaluation to those of a run."""
    path = run / NAME
    with unwritable(path), locked(path) as descriptor:
        os.truncate(path, read_bytes(path, RunError).rfind(b"\n") + 1)
        os.lseek(descriptor, 0, os.SEEK_END)
        os.write(descriptor, msgspec.json.encode(evaluation) + b"\n")
        os.fsync(descriptor)
