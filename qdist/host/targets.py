"""What can be opened by a name? Told from small files, before torch is loaded, a hub asked or anything packed."""

from pathlib import Path

from qdist.core.errors import ModelError, RunError, SpecError
from qdist.core.facts import require_library_class
from qdist.core.quoting import command, resuming
from qdist.core.same_shape import same_shape
from qdist.core.units import parse_bytes
from qdist.host import probe
from qdist.host.files import cache_path
from qdist.host.gguf_header import parts_of
from qdist.host.nearby import nearest_model, opening
from qdist.host.rundir import RunDir
from qdist.host.sources import ADAPTER, Located, locate
from qdist.host.state import state_of


def check_target(name: str) -> None:
    """Refuse what `generate` and `chat` cannot open: they take a run with an adapter, or a model.

    Raises RunError or ModelError, with what is nearest.
    """
    run, folder = RunDir(name), Path(name).expanduser()
    if run.exists():
        require_base(run)
        require_adapter(run)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise _no_target(folder)
    elif not folder.exists() and (near := nearest_model(name)) and RunDir(near).exists():
        raise RunError(f"{name} is neither a run nor a model", try_=near)
    else:
        check_model(name)


def _no_target(folder: Path) -> RunError:
    if (folder / ADAPTER).is_file() and RunDir(folder.parent).exists():
        return RunError(f"{folder} is the adapter of a run", try_=f"the run: {folder.parent}")
    inside = " or ".join(str(path) for path, _ in zip(opening(folder), range(5), strict=False))
    return RunError(
        f"{folder} is neither a run nor a model: it has no plan.json and no config.json",
        try_=inside or "a run, a folder with config.json, a .gguf file, an alias or a hub id",
    )


def check_model(name: str) -> Located:
    """Where a model is that can be opened, not only planned for.

    Raises ModelError for one that is not there, that only its own code computes, or whose GGUF file is split.
    """
    located = locate(name)
    require_readable(located, name=name)
    return located


def require_readable(located: Located, *, name: str) -> None:
    """Raise ModelError for a model that was found and cannot be opened."""
    config = located.config
    if located.kind == "hub" and config is None and (same := same_shape(located.path)):
        config = same.config
    require_library_class(config or {}, name=name)
    if located.kind == "gguf" and len(parts := parts_of(Path(located.path))) > 1:
        raise ModelError(
            f"{name} is split into {len(parts)} files, which transformers does not read",
            try_="llama-gguf-split --merge of llama.cpp, which makes one file of them",
        )


def memory_cap(amount: str | None) -> tuple[str, ...]:
    """Flags, of the process that opens a model, for what it may put on each GPU. amount: such as '20GiB', or None.

    Raises SpecError for what is no amount, and where there is no GPU.
    """
    if amount is None:
        return ()
    wanted = parse_bytes(amount, "max_memory")
    if probe.cluster().device == "cpu":
        raise SpecError("--max-memory caps GPUs, and this machine has none", try_="leave it out")
    return ("--max-memory-bytes", str(wanted))


def require_checkpoint(run: RunDir) -> None:
    """Raise RunError where there is nothing to gather an adapter from yet."""
    if not run.checkpoint_steps():
        raise RunError(f"{run.path} has no whole checkpoint yet", try_=_for_a_checkpoint(run))


def require_base(run: RunDir) -> None:
    """Raise RunError where the user's model that a run was trained on is gone, and so is what was packed from it.

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
    """Raise RunError where a run has no adapter yet: it is not at its end."""
    if not run.adapter.is_dir():
        there = bool(run.checkpoint_steps())
        raise RunError(
            f"{run.path} has no adapter yet" + ", and no whole checkpoint" * (not there),
            try_=command("gather", run.path) if there else _for_a_checkpoint(run),
        )


def _for_a_checkpoint(run: RunDir) -> str:
    return command("monitor", run.path) if state_of(run) == "running" else resuming(run.path)
