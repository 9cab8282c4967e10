"""`qdist monitor`: watch a run from any terminal, while it runs or after."""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
from rich.console import Console

from qdist.cli.views.dashboard import KEYS, PANES, Pane, dashboard
from qdist.cli.views.screen import Keys, Painter
from qdist.core.errors import RunError
from qdist.core.telemetry.snapshot import Snapshot
from qdist.core.telemetry.snapshot_json import as_json
from qdist.host.run.observer import Look
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say_json

_POLL_S, _DRAW_S = 0.5, 1.0


@dataclass
class Screen:
    """What the keys have chosen."""

    pane: Pane = "overview"
    rank: int = 0
    paused: bool = False
    quit: bool = False

    def press(self, key: str, ranks: int) -> None:
        """Take note of what was typed; keys that mean nothing do nothing.

        `l` shows the log of a rank, and in it that of the next; a digit that of its rank.
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
                self.rank = (self.rank + 1) % ranks if self.pane == "log" else self.rank
                self.pane = "log"
            elif one.isdecimal() and self.pane == "log" and int(one) < ranks:
                self.rank = int(one)

    @property
    def foot(self) -> str:
        """The last line."""
        keys = "q quit  p pause  tab panes  l next rank  0-9 rank" if self.pane == "log" else KEYS
        return ("PAUSED  " if self.paused else "") + f"{self.pane}   {keys}"


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print one view and end.")
@click.option("--json", "as_object", is_flag=True, help="Print one JSON object and end.")
@click.option("--rank", type=click.IntRange(min=0), help="Show the log of this rank.")
def monitor(run: Path, once: bool, as_object: bool, rank: int | None) -> None:
    """Watch RUN: memory, speed, loss, warnings. Keys: q, p (pause), tab (panes), l (logs)."""
    if as_object and rank is not None:
        raise click.UsageError("--json tells of all ranks: leave --rank out")
    look = Look(RunDir(run))
    if rank is not None and rank >= look.plan.world_size:
        raise RunError(f"{run} has no rank {rank}", try_=f"--rank 0 to {look.plan.world_size - 1}")
    screen = Screen(pane="overview" if rank is None else "log", rank=rank or 0)
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


def _seen(look: Look, screen: Screen) -> Snapshot:
    return look.snapshot(log_rank=screen.rank if screen.pane == "log" else None)


def _watch(look: Look, screen: Screen, console: Console) -> None:
    """Draw at most twice a second, and at rest only what changed, until q."""
    shown: tuple[object, ...] = ()
    snapshot, painter = _seen(look, screen), Painter(console)

    def leave() -> None:
        console.set_alt_screen(False)
        console.show_cursor(True)

    def come_back() -> None:
        nonlocal shown
        console.set_alt_screen(True)
        console.show_cursor(False)
        painter.forget()
        shown = ()

    with console.screen(hide_cursor=True), Keys(leave=leave, come_back=come_back) as keys:
        while not screen.quit:
            size = console.size
            clock = int(time.time() / _DRAW_S) if snapshot.state in ("running", "planned") else 0
            drawn = (size, screen.pane, screen.rank, screen.paused, snapshot.state, snapshot.fold.step)
            if (drawn, clock if not screen.paused else 0) != shown:
                painter.draw(dashboard(snapshot, size.width, size.height, screen.pane, foot=screen.foot))
                shown = (drawn, clock if not screen.paused else 0)
            key = keys.wait(_POLL_S)
            screen.press(key, look.plan.world_size)
            if not screen.paused or key:
                snapshot = _seen(look, screen)
