"""What a launch would do, as lines for a person."""

from collections.abc import Iterator

from qdist.cli.planned import plan_lines
from qdist.core.storage import storage
from qdist.core.units import counted, format_bytes
from qdist.host.launcher import Preview
from qdist.host.survey import Work

_DONE = {"fetch": "fetched", "convert": "converted", "pack": "packed", "tokenize": "tokenized"}


def preview_lines(preview: Preview) -> list[str]:
    """The plan, what comes before its ranks, and what the run would leave on the disk."""
    return [*_plan(preview), *map(_work, preview.work), *_disk(preview)]


def _plan(preview: Preview) -> list[str]:
    if preview.job is None:
        return ["plan     known once the model is fetched: only then its shape is"]
    lines = plan_lines(preview.job.plan, notes=preview.job.notes)
    return lines if preview.knows_steps else [line for line in lines if not line.startswith("steps")]


def _work(work: Work) -> str:
    size = format_bytes(work.size_bytes) if work.size_bytes else ""
    if work.there:
        return f"{_DONE[work.action]} already: {work.there}" + (f", {size}" if work.action == "tokenize" else "")
    named = f"would {work.action:<9}{work.what}"
    if work.action == "fetch":
        return f"{named} from the hub ({f'about {size} in 16 bits' if size else 'only the hub knows its size'})"
    if work.action == "tokenize":
        return f"{named}, in {work.folder}"
    return f"{named} to {work.into}, {size or 'as large as it turns out'}, in {work.folder}"


def _disk(preview: Preview) -> Iterator[str]:
    if preview.job is None:
        yield f"run      {preview.run.path}, not created"
        return
    takes = storage(preview.job.plan)
    several = counted(takes.most_checkpoints, "checkpoint")
    yield (
        f"disk     at most {several} of {format_bytes(takes.checkpoint)} and an adapter of "
        f"{format_bytes(takes.adapter)} in {preview.run.path}"
    )
    yield f"run      {preview.run.path}, not {'changed' if preview.run.exists() else 'created'}; its launch.sh:"
