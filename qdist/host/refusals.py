"""Run directories that a launch must leave alone: those that are at work, finished, unfinished, or something else."""

from qdist.core.errors import RunError
from qdist.core.quoting import command, resuming
from qdist.host.rundir import RunDir
from qdist.host.state import state_of


def refuse_running(run: RunDir) -> None:
    """Raise RunError where ranks are at work on a run: its plan must stay that of its ranks."""
    if run.exists() and state_of(run) == "running":
        raise RunError(f"{run.path} is being trained by another process", try_=command("monitor", run.path))


def require_checkpoint(run: RunDir) -> None:
    """Raise RunError where there is nothing to gather an adapter from yet."""
    if not run.checkpoint_steps():
        raise RunError(f"{run.path} has no whole checkpoint yet", try_=_for_a_checkpoint(run))


def require_adapter(run: RunDir) -> None:
    """Raise RunError where a run has no adapter yet: it is not at its end."""
    if not run.adapter.is_dir():
        there = bool(run.checkpoint_steps())
        raise RunError(
            f"{run.path} has no adapter yet" + ", and no whole checkpoint" * (not there),
            try_=command("gather", run.path) if there else _for_a_checkpoint(run),
        )


def _for_a_checkpoint(run: RunDir) -> str:
    return command("monitor", run.path) if state_of(run) == "running" else resuming(run.path)


def refuse_used(run: RunDir) -> None:
    """Raise RunError where a new run cannot lie."""
    refuse_running(run)
    if run.result() is not None:
        raise RunError(f"{run.path} holds a finished run", try_="another --run")
    if run.exists():
        steps = run.checkpoint_steps()
        where = f"a checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"
        raise RunError(
            f"{run.path} holds an unfinished run with {where}",
            try_=f"{resuming(run.path)}, or another --run",
        )
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunError(f"{run.path} exists and is not a run", try_="another --run")
