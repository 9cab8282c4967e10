"""What `qdist evaluate` is asked: its flags, but for those that are settings of a run."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from qdist.core.spec.sections import Positive

Beside = Literal["base", "merged"]


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tasks for one or several models."""

    targets: tuple[str, ...] = ()
    """Runs, or models that `qdist launch` takes; none where tasks are of files alone."""
    tasks: Annotated[
        str,
        Meta(
            description="Tasks with commas between: perplexity:FILE, loss (the run's held-out samples) or loss:FILE, "
            "mmlu:FILE, mmlu5:FILE (five examples before each question), lm:TASK (by lm-evaluation-harness's "
            "name or as a YAML file), generate:FILE (ROUGE and BLEU of answers), judge:FILE_A,FILE_B (of files that "
            "generate wrote), elo:FILE (pairwise ratings)."
        ),
    ]
    beside: Annotated[
        tuple[Beside, ...],
        Meta(description="What to evaluate beside a run's adapter: base, merged (RUN/merged), or base,merged."),
    ] = ()
    limit: Annotated[
        Positive | None, Meta(description="Questions, samples or windows of each task, from the first.  [default: all]")
    ] = None
    window: Annotated[
        Positive | None, Meta(description="perplexity: tokens of a window.  [default: 2048, or all that the model has]")
    ] = None
    stride: Annotated[
        Positive | None, Meta(description="perplexity: tokens from one window to the next.  [default: the window]")
    ] = None
    max_new_tokens: Annotated[Positive, Meta(description="generate: tokens of an answer, at most.")] = 256
    batch: Annotated[Positive, Meta(description="generate: answers at a time, on each GPU.")] = 8
    chat: Annotated[bool, Meta(description="lm: word examples and questions by the model's chat template.")] = False
    json: Annotated[bool, Meta(description="Print JSON instead of a table.")] = False
    out: Annotated[str | None, Meta(description="A file for the JSON.")] = None
