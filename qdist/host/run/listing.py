"""Which runs exist and how far each has come, from only the relevant lines of a long log."""

import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from qdist.core.errors import QdistError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import State, decode_lines
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodesNow, nodes_in_words
from qdist.host.run.nodes import nodes_now
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.run.state import state_of

_TAIL_BYTES = 1 << 16
"""Bytes read from the end of a log: more than the last steps that the fold looks at."""
_TURNS = (b'{"kind":"load"', b'{"kind":"start"', b'{"kind":"resume"')
"""Prefixes of lines before which the ranks may have been down."""
_EVALUATION = b'{"kind":"eval"'


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One run in a list. None means unknown."""

    path: str
    state: State | Literal["unreadable"]
    why: str = ""
    """First line of the error that ended the run, or of why it is unreadable; which nodes a running one misses."""
    model: str = ""
    method: str = ""
    bits: int = 0
    data: str = ""
    """The data's name; empty for random tokens."""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Mean loss of the last steps."""
    held_out_loss: float | None = None
    """Loss of the last evaluation."""
    tokens_per_s: float | None = None
    device: Literal["cuda", "cpu", ""] = ""
    gpu_hours: float | None = None
    """Hours that the ranks were up times the GPUs of the last launch; None for a run of CPU processes."""
    cpu_rank_hours: float | None = None
    started: float | None = None
    """First launch, in seconds since the epoch; None for a run that was only planned."""
    planned: float
    """When its plan was last written, in seconds since the epoch."""
    nodes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Names of its nodes; unset for a run of one machine."""


def find(folders: Iterable[Path]) -> list[Path]:
    """Folders with a plan: those given, and up to two levels below them; none inside another run.

    Raises RunError for a folder that does not exist.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder", try_="qdist runs FOLDER, where FOLDER holds runs")
        found |= dict.fromkeys(_below(folder, levels=2))
    return list(found)


def _below(folder: Path, *, levels: int) -> Iterator[Path]:
    if (folder / PLAN).is_file():
        yield folder
    elif levels and os.access(folder, os.R_OK | os.X_OK):
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _below(inner, levels=levels - 1)


def listed(paths: Iterable[Path]) -> list[Listed]:
    """One entry per run, newest first. An unreadable run is listed with the reason."""
    rows = [_look(RunDir(path)) for path in paths]
    return sorted(rows, key=lambda row: row.started or row.planned, reverse=True)


def _look(run: RunDir) -> Listed:
    planned = (run.path / PLAN).stat().st_mtime
    try:
        return _row(run, run.plan(), planned)
    except (QdistError, OSError) as error:
        why = error.message if isinstance(error, QdistError) else str(error)
        return Listed(path=str(run.path), state="unreadable", why=_first_line(why), planned=planned)


def _row(run: RunDir, plan: Plan, planned: float) -> Listed:
    state, ended, fold = state_of(run), run.ended(), skim(run)
    result: dict[str, Any] = run.result() or {}
    measured = result.get("tokens_per_s", {}).get("measured")
    rank_hours = fold.trained_s / 3600 if fold.stretches else None
    on_gpus = plan.device == "cuda"
    gpus = sum(len(rank.gpus) for rank in plan.ranks)
    nodes, running = nodes_now(run), state == "running"
    return Listed(
        path=str(run.path),
        state=state,
        why=_first_line(ended.message) if ended and state == "failed" else _of_nodes(nodes) if running else "",
        model=plan.spec.model,
        method=plan.spec.method,
        bits=plan.spec.bits,
        data=plan.spec.data.path,
        step=fold.step,
        steps=plan.steps,
        loss=fold.smoothed_loss,
        held_out_loss=fold.held_out[-1][1] if fold.held_out else None,
        tokens_per_s=measured or fold.tokens_per_s,
        device=plan.device,
        gpu_hours=rank_hours * gpus if on_gpus and rank_hours is not None else None,
        cpu_rank_hours=rank_hours * plan.world_size if not on_gpus and rank_hours is not None else None,
        started=fold.stretches[0].began if fold.stretches else None,
        planned=planned,
        nodes=tuple(member.name for member in nodes.members) if nodes else msgspec.UNSET,
    )


def _of_nodes(nodes: NodesNow | None) -> str:
    """'b has not been heard of for 42 s: the run goes on with a, c'; empty if no node is missing."""
    return "; ".join(nodes_in_words(nodes, time.time())) if nodes else ""


def skim(run: RunDir) -> RunHistory:
    """A fold of the last steps, every evaluation and the ranks' uptime; its other columns are incomplete."""
    fold, path = RunHistory(), run.event_file(0)
    if not path.is_file() or not path.stat().st_size:
        return fold
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # From the start of a line; where a single line is longer than the tail, from the start of the file.
        tail = data.find(b"\n", len(data) - _TAIL_BYTES) + 1 if len(data) > _TAIL_BYTES else 0
        lines = {start: _line(data, start) for start in _starts(data, _EVALUATION, tail)}
        for turn in _TURNS:
            for start in _starts(data, turn, tail):
                lines[start] = _line(data, start)
                if start:  # the last word of the stretch before
                    before = data.rfind(b"\n", 0, start - 1) + 1
                    lines[before] = _line(data, before)
        fold.add_of_rank(0, decode_lines(b"".join(lines[start] for start in sorted(lines)) + data[tail:]))
    return fold


def _starts(data: mmap.mmap, beginning: bytes, end: int) -> Iterator[int]:
    """Offsets before `end` of lines that start with `beginning`."""
    start = data.find(beginning, 0, end)
    while start >= 0:
        if start == 0 or data[start - 1] == ord("\n"):
            yield start
        start = data.find(beginning, start + 1, end)


def _line(data: mmap.mmap, start: int) -> bytes:
    return data[start : data.find(b"\n", start) + 1]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
