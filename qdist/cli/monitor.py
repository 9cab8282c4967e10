"""`qdist monitor`: watch a run from any terminal, while it runs or after."""

import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from qdist.cli.views.dashboard import KEYS, PANES, Pane, dashboard
from qdist.cli.views.screen import Keys, Painter
from qdist.core.errors import RunError
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodesNow
from qdist.core.telemetry.snapshot import Row, Snapshot, mfu, rows
from qdist.core.telemetry.warnings import find_warnings
from qdist.host.run.observer import RunObserver
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say_json

_POLL_S, _DRAW_S = 0.5, 1.0


@dataclass
class Screen:
    """Choices made with keys."""

    pane: Pane = "overview"
    rank: int = 0
    every: bool = False
    """Whether the pane of logs shows those of all ranks."""
    paused: bool = False
    quit: bool = False

    def press(self, key: str, ranks: int) -> None:
        """Take note of what was typed; keys that mean nothing do nothing.

        `l` shows the log of a rank, and in it that of the next; a digit that of its rank; `a` those of all ranks.
        """
        for one in (key,) if key.startswith("\x1b") else key:
            if one in ("q", "Q"):
                self.quit = True
            elif one == "p":
                self.paused = not self.paused
            elif one in ("\t", "\x1b[Z"):
                step = 1 if one == "\t" else -1
                self.pane = PANES[(PANES.index(self.pane) + step) % len(PANES)]
            elif one == "l":
                self.rank = (self.rank + 1) % ranks if self.pane == "log" and not self.every else self.rank
                self.pane, self.every = "log", False
            elif one == "a" and self.pane == "log":
                self.every = True
            elif one.isdecimal() and self.pane == "log" and int(one) < ranks:
                self.rank, self.every = int(one), False

    @property
    def foot(self) -> str:
        """Text of the last line."""
        keys = "q quit  p pause  tab panes  l next rank  0-9 rank  a all ranks" if self.pane == "log" else KEYS
        return ("PAUSED  " if self.paused else "") + f"{self.pane}   {keys}"


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print one view and end.")
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object and end.")
@click.option("--rank", type=click.IntRange(min=0), help="Show the log of this rank.")
@click.option("--logs", is_flag=True, help="Show the ends of all ranks' logs.")
def monitor(run: Path, once: bool, as_object: bool, rank: int | None, logs: bool) -> None:
    """Watch RUN: memory, speed, loss, warnings. Keys: q, p (pause), tab (panes), l (logs)."""
    if as_object and (rank is not None or logs):
        raise click.UsageError(f"--json tells of all ranks: leave {'--logs' if logs else '--rank'} out")
    if logs and rank is not None:
        raise click.UsageError("--logs shows all ranks and --rank one: give one of the two")
    look = RunObserver(RunDir(run))
    if rank is not None and rank >= look.plan.world_size:
        raise RunError(f"{run} has no rank {rank}", try_=f"--rank 0 to {look.plan.world_size - 1}")
    screen = Screen(pane="overview" if rank is None and not logs else "log", rank=rank or 0, every=logs)
    if as_object:
        say_json(msgspec.json.format(msgspec.json.encode(as_json(look.snapshot())), indent=2))
        return
    console = Console(highlight=False)
    # rich takes a pipe for a terminal where FORCE_COLOR is set.
    if once or not sys.stdout.isatty() or console.is_dumb_terminal:
        width, height = console.size
        console.print(dashboard(_seen(look, screen), width, height - 1, screen.pane, foot=""))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is put back then as well
    try:
        _watch(look, screen, console)
    except (KeyboardInterrupt, EOFError):
        return


def _seen(look: RunObserver, screen: Screen) -> Snapshot:
    shown = screen.pane == "log"
    return look.snapshot(log_rank=screen.rank if shown else None, all_logs=shown and screen.every)


def _watch(look: RunObserver, screen: Screen, console: Console) -> None:
    """Draw at most twice a second, and at rest only what changed, until q."""
    shown: tuple[object, ...] = ()
    snapshot, painter = _seen(look, screen), Painter(console, full=True)

    def come_back() -> None:
        nonlocal shown
        painter.enter()
        shown = ()

    with painter, Keys(leave=painter.leave, come_back=come_back) as keys:
        while not screen.quit:
            size = console.size
            clock = int(time.time() / _DRAW_S) if snapshot.state in ("running", "planned") else 0
            drawn = (size, screen.pane, screen.rank, screen.every, screen.paused, snapshot.state, snapshot.fold.step)
            if (drawn, clock if not screen.paused else 0) != shown:
                painter.draw(dashboard(snapshot, size.width, size.height, screen.pane, foot=screen.foot))
                shown = (drawn, clock if not screen.paused else 0)
            key = keys.wait(_POLL_S)
            screen.press(key, look.plan.world_size)
            if not screen.paused or key:
                snapshot = _seen(look, screen)


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Plain values with units in their names; None for what is unknown or NaN."""
    fold, plan = snapshot.fold, snapshot.plan
    mean = fold.mean_tokens_per_s
    saved = fold.checkpoints[-1] if fold.checkpoints else None
    found = {
        "run": snapshot.name,
        "state": snapshot.state,
        "message": snapshot.message,
        "try": snapshot.try_,
        "time": snapshot.now,
        "model": plan.spec.model,
        "method": plan.spec.method,
        "bits": plan.spec.bits,
        "step": fold.step,
        "total_steps": fold.total_steps or plan.steps,
        "loss": fold.loss,
        "smoothed_loss": fold.smoothed_loss,
        "held_out": [{"step": step, "loss": _number(loss)} for step, loss in fold.held_out],
        "tasks": {
            task: [{"step": step, "figure": _number(value)} for step, value in points]
            for task, points in fold.tasks.items()
        },
        "ended_early": fold.ended_early,
        "learning_rate": fold.learning_rate,
        "gradient_norm": fold.gradient_norm,
        "skipped_updates": len(fold.skipped),
        "tokens_per_s": fold.tokens_per_s,
        "mean_tokens_per_s": mean,
        "predicted_tokens_per_s": plan.tokens_per_second or None,
        "positions_per_s": fold.positions_per_s,
        "predicted_positions_per_s": plan.positions_per_second or None,
        "mfu": mfu(snapshot, fold.tokens_per_s),
        "mean_mfu": mfu(snapshot, mean),
        "padding_share": fold.padding_share,
        "data_share": fold.data_share,
        "slowest_rank": fold.skew[0] if fold.skew else None,
        "skew_share": fold.skew[1] if fold.skew else None,
        "seconds_left": fold.seconds_left,
        "checkpoint_step": saved[0] if saved else None,
        "checkpoint_time": saved[1] if saved else None,
        "ranks": [_row(row) for row in rows(snapshot)],
        "warnings": [warning.text for warning in find_warnings(snapshot)],
    }
    if snapshot.nodes:
        found |= _nodes(snapshot.nodes, fold)
    return {key: _number(value) for key, value in found.items()}


def _row(row: Row) -> dict[str, Any]:
    found = row._asdict()
    if not row.node:
        del found["node"]
    found["card"] = None if row.card is None else row.card._asdict()
    return {key: _number(value) for key, value in found.items()}


def _nodes(nodes: NodesNow, fold: RunHistory) -> dict[str, Any]:
    """Of a run of several machines: its nodes by name, and what their losses cost."""
    members = {
        member.name: {
            "address": member.address,
            "ranks": member.ranks,
            "state": "lost" if member.name in nodes.down else "member",
        }
        for member in nodes.members
    }
    gone = {one.name: {"address": "", "ranks": [], "state": "lost"} for one in nodes.missing if one.name not in members}
    return {
        "nodes": members | gone,
        "waiting": nodes.waiting,
        "generation": nodes.now.number if nodes.now else None,
        "generations": [
            {"number": one.number, "time": one.time, "step": one.step, "nodes": [member.name for member in one.members]}
            for one in nodes.generations
        ],
        "repeated_s": fold.repeated_s,
        "paused_s": nodes.paused_s,
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
