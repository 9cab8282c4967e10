"""Perplexity of a text, and held-out losses: tasks whose figure is a mean log-probability."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qdist.core.errors import DataError, SpecError
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.scoring import Item, Scored
from qdist.core.evaluation.windows import windows
from qdist.runtime.data.encode import opening
from qdist.runtime.data.tokenized import IGNORED, TokenizedSet


class LogLikelihood:
    """A task that asks for all targets of its items, and sums them up."""

    def __init__(
        self,
        name: str,
        asked: list[Item],
        *,
        as_perplexity: bool,
        settings: Mapping[str, str | int | float],
        notes: tuple[str, ...] = (),
    ) -> None:
        """as_perplexity: whether the figure is the perplexity, or the loss."""
        self.name, self._asked, self._as_perplexity = name, asked, as_perplexity
        self._settings, self._notes = settings, notes

    def items(self) -> list[Item]:
        """The windows or samples."""
        return self._asked

    def result(self, scored: list[Scored]) -> TaskResult:
        """The figure over all tokens alike. Outcomes are an item's mean loss, weighted by its tokens."""
        losses = [-math.fsum(own.logprobs) for own in scored]
        counts = [len(own.logprobs) for own in scored]
        loss = math.fsum(losses) / sum(counts)
        name, value = ("perplexity", math.exp(loss)) if self._as_perplexity else ("loss", loss)
        return TaskResult(
            task=self.name,
            figures=(Figure(name=name, value=value, count=sum(counts), more_is_better=False),),
            outcomes=tuple(own / count for own, count in zip(losses, counts, strict=True)),
            weights=tuple(map(float, counts)),
            settings=self._settings,
            notes=self._notes,
        )


def perplexity(
    name: str, texts: Sequence[str], tokenizer: Any, *, window: int, stride: int, limit: int | None
) -> LogLikelihood:
    """The perplexity of texts, each in windows of its own.

    limit: windows, from the first. Raises SpecError for a stride wider than the window, DataError for too little text.
    """
    if not 0 < stride <= window:
        raise SpecError(
            f"a stride of {stride} does not go with a window of {window}: tokens between windows would be left out",
            try_=f"--stride {window}",
        )
    first = opening(tokenizer)
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    every = [item for tokens in encoded for item in windows([*first, *tokens], window=window, stride=stride)]
    if not every:
        raise DataError(f"{name}: the text has no two tokens", try_="a longer text")
    asked = every[:limit]
    notes = (f"the first {len(asked):,} of {len(every):,} windows",) if len(asked) < len(every) else ()
    settings = {"window": window, "stride": stride, "windows": len(asked)}
    return LogLikelihood(name, asked, as_perplexity=True, settings=settings, notes=notes)


def held_out(
    name: str, tokenized: TokenizedSet, indices: Sequence[int], *, longest: int, limit: int | None
) -> LogLikelihood:
    """The loss on samples as in training: over their learned tokens. limit: samples, from the first."""
    chosen = indices[:limit]
    asked = [item for item in (_of_sample(tokenized, index, longest) for index in chosen) if item.positions]
    if not asked:
        raise DataError(f"{name}: there is no sample with a learned token", try_="loss:FILE")
    notes = (f"the first {len(chosen):,} of {len(indices):,} samples",) if len(chosen) < len(indices) else ()
    return LogLikelihood(name, asked, as_perplexity=False, settings={"samples": len(asked)}, notes=notes)


def _of_sample(tokenized: TokenizedSet, index: int, longest: int) -> Item:
    """A sample's item: its learned tokens are targets."""
    span = tokenized.span(index)
    tokens = tokenized.tokens[span][:longest].tolist()
    labels = tokenized.labels[span][:longest].tolist()
    positions = tuple(place - 1 for place in range(1, len(tokens)) if labels[place] != IGNORED)
    return Item(tuple(tokens), positions, tuple(labels[place + 1] for place in positions))
