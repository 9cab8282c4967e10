"""What does a run directory hold for a report?"""

from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.telemetry.report import Found
from qdist.host.opening import read_bytes, read_typed
from qdist.host.run.evaluations import read_evaluations
from qdist.host.run.observer import RunObserver
from qdist.host.run.rundir import RunDir, noted


def read_found(run: RunDir, name: str) -> Found:
    """Read a run's current state. Raises RunError if it is not a run or one of its files is broken."""
    seen = RunObserver(run).snapshot()._replace(name=name)
    return Found(
        seen=seen,
        result=run.result_of(seen.plan),
        machine=run.machine(),
        versions=_versions(run.path / "versions.json"),
        recipe=_text(run.path / "recipe.toml"),
        commands=noted(run),
        evaluations=read_evaluations(run.path),
    )


def _text(path: Path) -> str:
    return read_bytes(path, RunError).decode(errors="replace") if path.is_file() else ""


def _versions(path: Path) -> dict[str, str]:
    away = "take the file out of the run"
    return read_typed(path, dict[str, str], RunError, try_=away) if path.is_file() else {}
