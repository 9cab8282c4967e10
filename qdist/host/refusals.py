"""Run directories that a launch must leave alone: those that are at work, finished, unfinished, or something else."""

from qdist.core.errors import RunError
from qdist.core.quoting import command, resuming
from qdist.host.rundir import RunDir
from qdist.host.state import state_of


def refuse_running(run: RunDir) -> None:
    """Raise RunError where ranks are at work on a run: its plan must stay that of its ranks."""
    if run.exists() and state_of(run) == "running":
        raise RunError(f"{run.path} is being trained by another process", try_=command("monitor", run.path))


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
