"""What the ranks of an evaluation are asked to do: the file beside their plan."""

import msgspec

from qdist.core.evaluation.results import What

JOB, FOUND = "evaluation.json", "found.json"
"""Files of an evaluation's directory: what is asked, and what was found."""


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the models on a backbone."""

    target: str
    """The run or model, as it was named."""
    what: What
    adapter: str = ""
    """Folder of the adapter that is on the backbone; empty for none."""
    step: int | None = None
    """Of the adapter's checkpoint."""


class EvaluationJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tasks for one or several models on one backbone."""

    subjects: tuple[Subject, ...]
    """Those without an adapter first: an adapter stays on."""
    tasks: tuple[str, ...]
    limit: int | None = None
    """Questions, samples or windows of each task, from the first; None for all."""
    window: int | None = None
    stride: int | None = None
    chat: bool = False
    """Whether tasks of lm_eval are worded by the chat template."""
    longest: int
    """Most tokens of an item."""
