"""Draws the live view of a run, as it was at a step, into an SVG: `python bench/live_picture.py RUN STEP OUT`."""

import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from qdist.cli.views.dashboard import dashboard
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.snapshot import Snapshot
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir


def main() -> None:
    """Fold the events up to the step, draw, save."""
    run, step, out = RunDir(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    plan = run.plan()
    events = [event for event in Follower(run.path).new_events() if event.step <= step and event.kind != "end"]
    state = RunHistory(total_steps=plan.steps)
    state.add(events)
    console = Console(record=True, width=88, force_terminal=True, file=StringIO())
    snapshot = Snapshot(name=run.path.name, plan=plan, fold=state, state="running", now=events[-1].time)
    console.print(dashboard(snapshot, 88, 22, foot=""))
    out.write_text(console.export_svg(title="qdist launch --gpus 2 --model smollm2-135m --bits 4 --data demo"))


if __name__ == "__main__":
    main()
