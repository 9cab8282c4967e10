"""What is the same for all nodes of a run: its directory, its settings, and what each node is to bring."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qdist.core.data.sources import STDIN
from qdist.core.errors import SpecError
from qdist.core.spec.run_spec import RunSpec, resolve
from qdist.host.data.sources import split_sources
from qdist.host.launch.planning import changes_of, settings_of
from qdist.host.launch.prepare import RUNS, stem_of


class Asked(NamedTuple):
    """A run of several nodes, as each of them is asked for it."""

    run: Path
    """Its directory, at the same absolute path on every node."""
    settings: Mapping[str, Any]
    """Nested settings of a new run, the recipe's included; changes to a resumed one."""
    resume: bool
    gpus: int | None = None
    """GPUs (CPU ranks) of each node; None for all (one)."""


def refuse_standard_input(spec: RunSpec) -> None:
    """Raise SpecError for data that only the process which is typed to can read."""
    if any(part.path == STDIN for part in split_sources(spec.data.path) + split_sources(spec.data.eval or "")):
        raise SpecError(f"standard input ({STDIN}) is one node's, and each node reads the data", try_="--data FILE")


def asked_of(recipe: str | None, given: Mapping[str, Any], *, resume: bool) -> Asked:
    """The run that flags and recipe ask for. Its name depends on these alone, so that all nodes find the same.

    Raises SpecError for settings that cannot be, or are not the same on several nodes.
    """
    if resume:
        run, changes = changes_of(recipe, given)
        gpus = changes.get("gpus")
        return Asked(run.path.absolute(), changes, True, None if gpus is None else resolve({"gpus": gpus}).gpus)
    _, settings = settings_of(recipe, given)
    spec = resolve(settings)
    if not spec.model:
        raise SpecError("no model was named", try_="--model smollm2-135m")
    refuse_standard_input(spec)
    path = Path(spec.run) if spec.run else RUNS / stem_of(spec)
    return Asked(path.absolute(), {key: value for key, value in settings.items() if key != "run"}, False, spec.gpus)
