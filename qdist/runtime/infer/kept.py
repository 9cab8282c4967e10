"""Which answers are there already? They are kept beside the final file as they come, so that a kill loses none."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from qdist.core.errors import RunError
from qdist.host.files import sync, unwritable, write_atomic
from qdist.host.opening import decoded, read_text
from qdist.runtime.infer.answerer import Reason


class Answered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: Reason
    after_s: float
    """Seconds since its process began to answer."""


class Kept:
    """A file of answers by number, which several processes may add to, each in a part of its own.

    The first line is the identity: of model, prompts and settings; answers to others are not taken over. A line
    that a kill left unterminated is not read.
    """

    def __init__(self, out: Path, identity: str) -> None:
        """out: the final file; this one and its parts lie beside it."""
        self.path = out.with_name(f".{out.name}.unfinished")
        self.answers: Mapping[int, Answered] = {}
        self._identity = identity

    def gather(self) -> None:
        """Read all parts, and make one file of them. For the only process at work."""
        parts = self.parts()
        self.answers = dict(chain.from_iterable(self._read(path).items() for path in (self.path, *parts)))
        lines = [self._identity, *([_line(self.answers)] if self.answers else [])]
        with unwritable(self.path):
            write_atomic(self.path, "\n".join(lines) + "\n")
        for part in parts:
            part.unlink()

    def read(self) -> None:
        """Read the file as `gather` left it."""
        self.answers = self._read(self.path)

    def part(self, number: int) -> Path:
        """The file of one process."""
        return self.path.with_name(f"{self.path.name}.{number}")

    def parts(self) -> list[Path]:
        """The files of processes at work, or killed."""
        beside = (path for path in self.path.parent.iterdir() if path.name.startswith(f"{self.path.name}."))
        return sorted(path for path in beside if path.suffix[1:].isdecimal())

    def adding(self, number: int) -> "Adding":
        """A context that stores answers in a part."""
        return Adding(self.part(number), self._identity)

    def publish(self, out: Path, lines: Iterable[str]) -> None:
        """Write the final file in place of this one: nothing is left beside it, whenever this process is killed."""
        with unwritable(out):
            write_atomic(self.path, "".join(f"{line}\n" for line in lines))
            os.replace(self.path, out)
            sync(out.parent)

    def _read(self, path: Path) -> dict[int, Answered]:
        """The answers stored there; none if of another identity or if the file is damaged."""
        try:
            lines = read_text(path, RunError).split("\n")[:-1] if path.exists() else []
            found = [decoded(line.encode(), dict[int, Answered], str(path), RunError) for line in lines[1:]]
        except RunError:
            return {}
        return dict(chain.from_iterable(map(dict.items, found))) if lines[:1] == [self._identity] else {}


class Adding:
    """A context that stores each answer with a line of its own, as it comes."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def __enter__(self) -> "Adding":
        with unwritable(self._path):
            self._file = self._path.open("w", encoding="utf-8")
        self._write(self._identity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, answers: Mapping[int, Answered]) -> None:
        """Store more answers."""
        self._write(_line(answers))

    def _write(self, line: str) -> None:
        with unwritable(self._path):
            self._file.write(line + "\n")
            self._file.flush()


def _line(answers: Mapping[int, Answered]) -> str:
    return msgspec.json.encode(answers).decode()


class Closing(NamedTuple):
    """What a command has answered, apart from what was there already."""

    answers: int
    """All of them."""
    tokens: int
    seconds: float
    """From the first step to the last answer; loading is not in it."""

    def __str__(self) -> str:
        """'8 answers, 1,024 tokens in 12.3 s, 83.1 tokens/s'."""
        text = f"{self.answers:,} answer{'s' * (self.answers != 1)}"
        if not self.tokens or not self.seconds:
            return text
        return f"{text}, {self.tokens:,} tokens in {self.seconds:,.1f} s, {self.tokens / self.seconds:,.1f} tokens/s"


def closing(before: Mapping[int, Answered], after: Mapping[int, Answered]) -> Closing:
    """What was added: copies that answer side by side take as long as the slowest."""
    new = [own for number, own in after.items() if number not in before]
    return Closing(len(after), sum(own.new_tokens for own in new), max((own.after_s for own in new), default=0.0))
