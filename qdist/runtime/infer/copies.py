"""Answers prompts by several copies of a model, each in a process of its own with a GPU of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import torch

from qdist.core.errors import JobError, PlanError
from qdist.core.planning.answering import Questions
from qdist.core.requests import Generate
from qdist.core.text import counted
from qdist.host import children
from qdist.host.machine.probe import shown_cards
from qdist.host.tasks import Task, handed_over
from qdist.host.terminal import say
from qdist.runtime.infer.kept import Kept
from qdist.runtime.infer.load import holds_copy

Copy = Mapping[str, str]
"""What the environment of a process is to have, to see its GPU alone."""


def dealt(order: Sequence[int], number: int, count: int) -> list[int]:
    """The share of one of `count` copies: every `count`-th, so that each gets as many long prompts as the others."""
    return list(order[number::count])


def copies_for(request: Generate, longest: int, waiting: int) -> list[Copy]:
    """A copy for each GPU that holds one, at most as many as the request says; none without a GPU.

    longest: tokens of a prompt and its answer, at most. waiting: answers to give; no copy gets less than a batch
    unless the request says how many there are.
    Raises PlanError if fewer GPUs hold a copy than the request says.
    """
    if not torch.cuda.is_available():
        return []
    tokens, cap = request.batch * request.beams * longest, request.max_memory_bytes
    asked = Questions(request.batch, longest) if request.beams == 1 else tokens
    holds = partial(holds_copy, request.run, asked=asked, dtype=request.dtype, max_memory_bytes=cap)
    holding = [card for card in shown_cards() if holds(card.free_bytes)]
    wanted = request.gpus
    if wanted is not None and len(holding) < wanted > 1:
        raise PlanError(
            f"{counted(len(holding), 'GPU')} of {len(shown_cards())} has room for a copy of the model and "
            f"{tokens:,} tokens; --gpus is {wanted}",
            try_="a smaller --batch, or without --gpus",
        )
    worth = -(-waiting // request.batch) if wanted is None else min(wanted, waiting)
    return [{"CUDA_VISIBLE_DEVICES": card.uuid} for card in holding[:worth]]


def answer_in_copies(request: Generate, copies: Sequence[Copy], kept: Kept, advance: Callable[[int], None]) -> None:
    """Have each copy answer its share into a part of what is kept; one that fails ends the others.

    advance: called with the number of answers that have come.
    Raises the QdistError that a copy ended with, JobError for one that was killed.
    """
    say(f"{len(copies)} copies of the model, each on a GPU of its own", err=True)
    count = len(copies)
    for part in (kept.part(number) for number in range(count)):
        part.unlink(missing_ok=True)
    with ExitStack() as stack:
        shares = [msgspec.structs.replace(request, share=(number, count)) for number in range(count)]
        tasks = [stack.enter_context(handed_over(share)) for share in shares]
        starts = [
            children.Start(task.command, children.environment(**copy), task.descriptors)
            for task, copy in zip(tasks, copies, strict=True)
        ]
        codes = children.run_together(starts, meanwhile=_Watch([kept.part(n) for n in range(count)], advance).look)
        _require_success(tasks, codes)


def _require_success(tasks: Sequence[Task], codes: Sequence[int]) -> None:
    """Raise the error of the first copy that has one to tell; else of one that was not ended by us."""
    answers = [task.answer() for task in tasks]
    for answer in answers:
        if answer is not None and answer.error:
            raise answer.error
    silent = [code for code, answer in zip(codes, answers, strict=True) if code and answer is None]
    if silent:
        code = next((code for code in silent if code != -children.ENDED_BY), silent[0])
        how = children.killed_by(-code) if code < 0 else f"ended with exit code {code}"
        raise JobError(f"a process that was at work {how}", try_="the same command again, which goes on where it was")


class _Watch:
    """Counts the answers in files that other processes write."""

    def __init__(self, parts: Sequence[Path], advance: Callable[[int], None]) -> None:
        self._read = dict.fromkeys(parts, 0)
        self._lines = dict.fromkeys(parts, -1)  # the first line is the identity
        self._advance = advance

    def look(self) -> None:
        """Tell of the answers that have come since the last look."""
        more = sum(self._new_in(part) for part in self._read)
        if more:
            self._advance(more)

    def _new_in(self, part: Path) -> int:
        if not part.exists():
            return 0
        with open(part, "rb") as file:
            file.seek(self._read[part])
            content = file.read()
        self._read[part] += len(content)
        before = max(0, self._lines[part])
        self._lines[part] += content.count(b"\n")
        return max(0, self._lines[part]) - before
