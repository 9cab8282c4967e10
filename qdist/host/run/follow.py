"""What the ranks of a run have said since last asked."""

import os
from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from itertools import chain
from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.telemetry.events import Event, decode_blocks, whole_length
from qdist.core.telemetry.history import Fold
from qdist.host.opening import readable, require_file
from qdist.host.run.rundir import of_ranks

_TAIL_BYTES = 1 << 18


class Follower:
    """Reads `<run>/events/rank*.jsonl` as they grow. A line that is still being written waits for its end.

    The run may not have started: files and the folder itself may appear later.
    say: called with a warning, the first time that lines are left out for they are no events.
    """

    def __init__(self, run: Path, *, say: Callable[[str], None] | None = None) -> None:
        self._folder, self._say = run / "events", say
        self.unread = ""
        """A sentence about the lines that were left out; empty where there are none."""
        self._read_bytes: dict[Path, int] = {}
        self._read_lines: dict[Path, int] = {}
        self._inodes: dict[Path, int] = {}

    def new_events(self) -> list[Event]:
        """Events since the last call, by time; those of one rank stay in the order written.

        Lines that are no events are left out, and told once.
        """
        streams = [list(chain.from_iterable(self._blocks(path))) for path in self._files()]
        return list(merge(*streams, key=lambda event: event.time))

    def fold_into(self, fold: Fold) -> None:
        """Add the events since the last call to a fold: faster where there are many.

        Where another run has taken the folder, the fold begins anew with it.
        """
        if self._replaced():
            self._read_bytes, self._read_lines, self._inodes = {}, {}, {}
            fold.restart()
        for path in self._files():
            rank = int(path.stem.removeprefix("rank"))
            # Rank 0 speaks of all steps; of the others a fold asks how they are now.
            for block in self._blocks(path, most_bytes=None if rank == 0 else _TAIL_BYTES):
                fold.add_of_rank(rank, block)
        fold.unread = self.unread

    def _files(self) -> list[Path]:
        """One a rank; a copy that somebody keeps beside it is none."""
        return of_ranks(self._folder, ".jsonl")

    def _replaced(self) -> bool:
        """Whether a file is another one, or shorter: a rank that is resumed cuts off no more than half a line."""
        there = [(path, path.stat()) for path in self._inodes if path.exists()]
        return any(now.st_ino != self._inodes[path] or now.st_size < self._read_bytes[path] for path, now in there)

    def _blocks(self, path: Path, *, most_bytes: int | None = None) -> Iterator[list[Event]]:
        """What a file has more than before, or the whole lines of the last `most_bytes` of it."""
        offset, lines = self._read_bytes.get(path, 0), self._read_lines.get(path, 0)
        require_file(path, RunError)
        with readable(path, RunError), path.open("rb") as file:
            self._inodes[path] = os.fstat(file.fileno()).st_ino
            file.seek(offset)
            data = file.read()
        start = data.find(b"\n", len(data) - most_bytes) + 1 if most_bytes and len(data) > most_bytes else 0
        lines += data.count(b"\n", 0, start)
        for block in decode_blocks(data[start:], first_line=lines + 1):
            lines += block.lines
            if block.bad and not self.unread:
                self._tell(path, block.bad)
            yield block.events
        self._read_bytes[path] = offset + whole_length(data)
        self._read_lines[path] = lines

    def _tell(self, path: Path, bad: Sequence[int]) -> None:
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        self.unread = f"{path}: line {bad[0]:,}{more} is no event, and is left out"
        if self._say:
            self._say(f"warning: {self.unread}")
