"""What a name opens, and which step a run's adapter is from; read from small files before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from qdist.core.data.reading import AS_FOUND, Reading, reading_of
from qdist.core.errors import ModelError, RunError, SpecError
from qdist.core.model.aliases import same_shape
from qdist.core.model.families import require_library_class
from qdist.core.text import command, counted, quoted, resuming
from qdist.host.files import cache_path
from qdist.host.machine import probe
from qdist.host.opening import require_file, told
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import state_of
from qdist.host.sources.gguf_header import parts_of
from qdist.host.sources.models import ADAPTER_FOLDER, Located, locate, nearest_model, opening


def check_target(name: str, *, max_memory: str | None = None, trusted: bool = False) -> None:
    """Refuse what `generate` and `chat` cannot open: anything but a run with an adapter, or a model.

    trusted: whether the model's own code may be run.
    Raises RunError or ModelError, with what is nearest; SpecError for a cap on GPUs where there are none.
    """
    if max_memory is not None and probe.cluster().device == "cpu":
        raise SpecError("--max-memory caps GPUs, and this machine has none", try_="leave it out")
    run, folder = RunDir(name), Path(name).expanduser()
    if run.exists():
        require_base(run)
        require_adapter(run)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise _no_target(folder)
    elif not folder.exists() and (near := nearest_model(name)) and RunDir(near).exists():
        raise RunError(f"{name} is neither a run nor a model", try_=near)
    else:
        check_model(name, trusted=trusted)


def reading_of_target(target: str) -> Reading:
    """How the records of a run are read, and so prompts to it; nothing is said for any other model."""
    run = RunDir(target)
    if not run.exists():
        return AS_FOUND
    spec = run.plan().spec
    return reading_of(spec.data, spec.format)


def check_gpus(wanted: int | None) -> None:
    """Raise SpecError if more GPUs are to answer than this machine shows."""
    count = len(probe.shown_cards()) if wanted is not None else 0
    if wanted is not None and wanted > count:
        there = counted(count, "GPU") if count else "none"
        raise SpecError(f"--gpus {wanted} counts GPUs, and this machine has {there}", try_="leave it out")


def check_adapter(name: str) -> None:
    """Raise SpecError for a model that is no run, and so has no adapter to compare with its base."""
    if not RunDir(name).exists():
        raise SpecError(f"--compare is of a run's adapter and its base, and {name} is a model", try_="leave it out")


class ServedTargets(NamedTuple):
    """What a server answers with, by the names that clients give."""

    paths: dict[str, str]
    """Run by name of its adapter; or one model, by an empty name."""
    base: str
    """Name of the base, or of the model."""

    @property
    def title(self) -> str:
        """'sql, legal', or the model's name."""
        return ", ".join(filter(None, self.paths)) or self.base


def targets_to_serve(words: Sequence[str]) -> ServedTargets:
    """Runs over one base, or one model, each as typed: `PATH` or `NAME=PATH`.

    Raises SpecError for names given twice, and for models beside others.
    """
    named = [_named(word) for word in words]
    runs = [(name, path) for name, path in named if RunDir(path).exists()]
    if not runs and len(named) == 1:
        name, path = named[0]
        return ServedTargets({"": path}, name or _model_name(path))
    if models := [path for _, path in named if not RunDir(path).exists()]:
        raise SpecError(
            f"{models[0]} is no run, and a model is served alone: only runs share one base",
            try_=command("serve", models[0]),
        )
    paths = {name or Path(path).resolve().name: path for name, path in runs}
    if len(paths) < len(runs):
        name, path = runs[-1][0] or Path(runs[-1][1]).resolve().name, runs[-1][1]
        raise SpecError(f"several of the runs are called {name}", try_=quoted(f"{name}-2={path}"))
    base = _model_name(RunDir(runs[0][1]).plan().spec.model)
    return ServedTargets(paths, f"{base}-base" if base in paths else base)


def _named(word: str) -> tuple[str, str]:
    """The name, or none, and the path of a target as typed."""
    name, found, path = word.partition("=")
    return (name, path) if found and not Path(word).exists() else ("", word)


def _model_name(model: str) -> str:
    """An alias or a hub id as it is; of a folder or a file its own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _no_target(folder: Path) -> RunError:
    if (folder / ADAPTER_FOLDER).is_file() and RunDir(folder.parent).exists():
        return RunError(f"{folder} is the adapter of a run", try_=f"the run: {folder.parent}")
    inside = " or ".join(str(path) for path, _ in zip(opening(folder), range(5), strict=False))
    return RunError(
        f"{folder} is neither a run nor a model: it has no plan.json and no config.json",
        try_=inside or "a run, a folder with config.json, a .gguf file, an alias or a hub id",
    )


def check_model(name: str, *, trusted: bool = False) -> Located:
    """Location of a model that can be opened, not only planned for.

    trusted: whether its own code may be run.
    Raises ModelError for one that is not there, that only its own code computes, or whose GGUF file is split.
    """
    located = locate(name)
    require_readable(located, name=name, trusted=trusted)
    return located


def require_readable(located: Located, *, name: str, trusted: bool = False) -> None:
    """Raise ModelError for a model that exists but cannot be opened."""
    config = located.config
    if located.kind == "hub" and config is None and (same := same_shape(located.path)):
        config = same.config
    require_library_class(config or {}, name=name, trusted=trusted)
    if located.kind == "gguf" and len(parts := parts_of(Path(located.path))) > 1:
        raise ModelError(
            f"{name} is split into {len(parts)} files, which transformers does not read",
            try_="llama-gguf-split --merge of llama.cpp, which makes one file of them",
        )


def require_checkpoint(run: RunDir) -> None:
    """Raise RunError if there is no checkpoint yet to gather an adapter from."""
    if not run.checkpoint_steps():
        raise RunError(f"{run.path} has no whole checkpoint yet", try_=_for_a_checkpoint(run))


def require_base(run: RunDir) -> None:
    """Raise RunError if both the model that a run was trained on and its packed form are gone.

    What is missing from a cache is made or fetched again.
    """
    plan = run.plan()
    path, packed = Path(plan.source.path), plan.source.packed
    there = path.is_dir() or (packed and Path(packed).is_dir())
    if plan.source.kind == "dummy" or there or path.is_relative_to(cache_path()) or "snapshots" in path.parts:
        return
    raise RunError(
        f"the model that {run.path} was trained on is no longer at {plan.source.path}", try_="put it back there"
    )


def require_adapter(run: RunDir) -> None:
    """Raise RunError if a run has no adapter yet because it has not finished."""
    if not run.adapter.is_dir():
        there = bool(run.checkpoint_steps())
        raise RunError(
            f"{run.path} has no adapter yet" + ", and no whole checkpoint" * (not there),
            try_=command("gather", run.path) if there else _for_a_checkpoint(run),
        )


def _for_a_checkpoint(run: RunDir) -> str:
    return command("monitor", run.path) if state_of(run) == "running" else resuming(run.path)


ADAPTER = "adapter_model.safetensors"
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""


def step_metadata(step: int, steps: int, *, checkpoint: str = "") -> dict[str, str]:
    """Metadata for an adapter's file, which PEFT ignores.

    checkpoint: what it was asked for by, where that was not its step.
    """
    said = {"step": str(step), "steps": str(steps)}
    return said | {"checkpoint": checkpoint} if checkpoint else said


def adapter_step(run: RunDir) -> tuple[int, int] | None:
    """(step, steps of the run) of a run's adapter; None if unknown or there is none."""
    step = _metadata(run).get("step", "")
    return (int(step), run.plan().steps) if step.isdecimal() else None


def step_note(run: RunDir) -> str:
    """'adapter of step 20 of 60 (checkpoint best)'; empty for the last step's."""
    found = adapter_step(run)
    if found is None or found[0] == found[1]:
        return ""
    checkpoint = _metadata(run).get("checkpoint")
    return f"adapter of step {found[0]} of {found[1]}" + (f" (checkpoint {checkpoint})" if checkpoint else "")


def step_of(run: RunDir, which: str) -> int | None:
    """The step that `last` or a number names; None for `best`. Raises RunError listing the available steps."""
    steps = run.checkpoint_steps()
    if which == "best":
        return None
    if which == "last" and steps:
        return steps[-1]
    if not which.isdecimal() or int(which) not in steps:
        raise RunError(
            f"{run.path} has no checkpoint {which!r}",
            try_=f"--checkpoint last, best or a step: {', '.join(map(str, steps))}",
        )
    return int(which)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header: each tensor's entry, and the file's own under `__metadata__`.

    Raises RunError if it cannot be read.
    """
    require_file(path, RunError)
    with told(str(path), RunError), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return msgspec.json.decode(file.read(min(length, _MOST_HEADER_BYTES)), type=dict[str, dict[str, Any]])


def _metadata(run: RunDir) -> dict[str, str]:
    try:
        return read_header(run.adapter / ADAPTER).get("__metadata__", {})
    except RunError:
        return {}
