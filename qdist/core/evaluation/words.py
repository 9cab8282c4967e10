"""What does `--tasks` ask for: which kinds of tasks, each with its argument?"""

import re
from typing import NamedTuple

from qdist.core.errors import SpecError, nearest

KINDS = {
    "perplexity": "perplexity:FILE",
    "loss": "loss, or loss:FILE",
    "mmlu": "mmlu:FILE",
    "mmlu5": "mmlu5:FILE",
    "generate": "generate:FILE",
    "judge": "judge:FILE_A,FILE_B",
    "elo": "elo:FILE",
    "lm": "lm:TASK",
}
"""Kinds of tasks, and how each is written."""
_NEEDS_NONE = ("loss",)
_WORD = re.compile(r"([a-z][a-z0-9_]*)(?::(.*))?", re.DOTALL)


class TaskWord(NamedTuple):
    """One task as it was typed."""

    kind: str
    argument: str = ""
    """A file, several with commas between, or a name; empty if the task needs none."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


def task_words(text: str) -> tuple[TaskWord, ...]:
    """The tasks of `--tasks`, such as `mmlu:FILE,judge:FILE_A,FILE_B,loss`.

    A comma that is followed by something other than a known kind belongs to the argument before it.
    Raises SpecError for a kind that there is not, with the nearest, and for one without its argument.
    """
    found: list[TaskWord] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        word = _word_of(piece)
        if word is not None:
            found.append(word)
        elif found and found[-1].argument:
            found[-1] = found[-1]._replace(argument=f"{found[-1].argument},{piece}")
        else:
            raise _unknown(piece)
    if not found:
        raise SpecError("no task was named", try_=f"--tasks {KINDS['perplexity']}")
    for word in found:
        if not word.argument and word.kind not in _NEEDS_NONE:
            raise SpecError(f"the task {word.kind} needs an argument", try_=KINDS[word.kind])
    return tuple(dict.fromkeys(found))


def _word_of(piece: str) -> TaskWord | None:
    """A task, if a piece begins with the name of one."""
    match = _WORD.fullmatch(piece)
    return TaskWord(match[1], match[2] or "") if match and match[1] in KINDS else None


def _unknown(piece: str) -> SpecError:
    kind = piece.partition(":")[0]
    close = nearest(kind, KINDS)
    return SpecError(f"there is no task called {kind!r}", try_=KINDS[close] if close else ", ".join(KINDS.values()))
