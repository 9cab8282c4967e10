"""What an evaluation found: figures by task, with what is needed to compare two of them."""

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

from qdist.core.evaluation.scoring import Item, Scored

What = Literal["adapter", "base", "merged", "model"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number."""

    name: str
    """Such as accuracy, perplexity, rouge1."""
    value: float
    count: int
    """Of how many answers, tokens or pairs it is."""
    low: float | None = None
    """Lower end of the 95 % interval; None if there is none."""
    high: float | None = None
    more_is_better: bool = True


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a task found of one model."""

    task: str
    """As it was asked for, such as mmlu:FILE."""
    figures: tuple[Figure, ...]
    """The first is the one that stands for the task."""
    groups: Mapping[str, Figure] = {}
    """The first figure by subject, language or file."""
    outcomes: tuple[float, ...] = ()
    """What each item contributes to the first figure, in the order of the file: for comparisons of two models."""
    weights: tuple[float, ...] = ()
    """Weight of each outcome, such as its tokens; empty if all weigh the same."""
    settings: Mapping[str, str | int | float] = {}
    """What the figures depend on: window, stride, shots."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one model."""

    target: str
    """The run or model, as it was named."""
    what: What
    results: tuple[TaskResult, ...]
    step: int | None = None
    """Of the adapter's checkpoint."""
    where: str = ""
    """Placement and ranks, as a line for people."""
    time: float = 0.0
    """Seconds since 1970."""


class ScoredTask(Protocol):
    """A task that asks for probabilities alone, so that it runs on every placement, and in training too."""

    name: str

    def items(self) -> list[Item]:
        """What is asked, in the order of the file."""

    def result(self, scored: list[Scored]) -> TaskResult:
        """What the answers to all items amount to."""
