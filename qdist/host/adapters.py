"""Of which step is a run's adapter? Told by the header of its file, without its tensors."""

import msgspec

from qdist.core.errors import RunError
from qdist.host.opening import require_file, told
from qdist.host.rundir import RunDir

ADAPTER = "adapter_model.safetensors"
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""


class _Header(msgspec.Struct):
    """What is read of a header."""

    metadata: dict[str, str] = msgspec.field(default_factory=dict, name="__metadata__")


def step_metadata(step: int, steps: int, *, checkpoint: str = "") -> dict[str, str]:
    """What an adapter's file says of itself beside its tensors, where PEFT does not look.

    checkpoint: what it was asked for by, where that was not its step.
    """
    said = {"step": str(step), "steps": str(steps)}
    return said | {"checkpoint": checkpoint} if checkpoint else said


def adapter_step(run: RunDir) -> tuple[int, int] | None:
    """(step, steps of the run) of the adapter that lies in a run; None where it does not say, or there is none."""
    step = _metadata(run).get("step", "")
    return (int(step), run.plan().steps) if step.isdecimal() else None


def step_note(run: RunDir) -> str:
    """'adapter of step 20 of 60 (checkpoint best)'; empty for that of the last step."""
    found = adapter_step(run)
    if found is None or found[0] == found[1]:
        return ""
    checkpoint = _metadata(run).get("checkpoint")
    return f"adapter of step {found[0]} of {found[1]}" + (f" (checkpoint {checkpoint})" if checkpoint else "")


def step_of(run: RunDir, which: str) -> int | None:
    """The step that `last` or a number names; None for `best`. Raises RunError listing the steps there are."""
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


def _metadata(run: RunDir) -> dict[str, str]:
    path = run.adapter / ADAPTER
    try:
        require_file(path, RunError)
        with told(str(path), RunError), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return msgspec.json.decode(file.read(min(length, _MOST_HEADER_BYTES)), type=_Header).metadata
    except RunError:
        return {}
