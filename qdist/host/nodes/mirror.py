"""How do nodes without a shared disk keep each other's events, logs and heartbeats, and what the run has made?

Events and logs are whole lines that are only ever added. Where two nodes have written to a file of the same rank, in
different generations, each side's lines are added behind the last one that both have.
"""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from qdist.core.errors import RunError
from qdist.core.telemetry.events import whole_length
from qdist.host.files import replace_folder, write_atomic
from qdist.host.nodes.checkpoints import fetch_checkpoint, send_checkpoint
from qdist.host.nodes.remote import Files, Missing, Refused
from qdist.host.nodes.serving import add, opened_to_append, place_in
from qdist.host.run.rundir import NODES, RESULT, RunDir

__all__ = ["Files", "Mirror", "fetch_checkpoint", "send_checkpoint", "send_history"]
EVERY_S = 1.0
_LAST_S = 10.0
"""Seconds that `Mirror.stop` waits for the last round."""
_TAIL_BYTES, _MOST_BYTES = 1 << 16, 4 << 20


class Side(Protocol):
    """A file of lines on one node."""

    def size(self) -> int:
        """Bytes of its whole lines, or of all; 0 if it does not exist."""

    def read(self, offset: int, length: int) -> bytes: ...

    def append(self, offset: int, data: bytes) -> int:
        """As `Files.append`."""


class Here:
    """A file of this node."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, offset: int, length: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            return b""

    def append(self, offset: int, data: bytes) -> int:
        with opened_to_append(self._path) as (file, size):
            if size == offset:
                add(file, size, data)
                size += len(data)
        return size


class There:
    """A file of the node that a run is mirrored to and from."""

    def __init__(self, files: Files, path: str) -> None:
        self._files, self._path = files, path

    def size(self) -> int:
        try:
            return self._files.get(self._path, length=0)[1]
        except Missing:
            return 0

    def read(self, offset: int, length: int) -> bytes:
        try:
            return self._files.get(self._path, offset, length)[0]
        except Missing:
            return b""

    def append(self, offset: int, data: bytes) -> int:
        return self._files.append(self._path, offset, data)


class Growth:
    """Adds to one file what has grown in another."""

    def __init__(self, source: Side, sink: Side) -> None:
        self._source, self._sink = source, sink
        self._done: tuple[int, int] | None = None
        """Bytes of source and sink that are in step; None if they must be compared."""

    def carry(self) -> None:
        """Carry all whole lines that are there now."""
        while self._block():
            pass

    def _block(self) -> bool:
        """Carry some lines; whether there may be more."""
        size = self._source.size()
        if self._done is None or self._done[0] > size:
            if not size:
                return False
            self._done = self._compare(size)
        taken, given = self._done
        data = self._source.read(taken, _MOST_BYTES) if size > taken else b""
        full = len(data) == _MOST_BYTES
        data = data[: whole_length(data)] or (data if full else b"")
        if not data:
            return False
        found = self._sink.append(given, data)
        moved = found == given + len(data)
        self._done = (taken + len(data), found) if moved else None
        return full and moved

    def _compare(self, size: int) -> tuple[int, int]:
        """Where to go on in source and sink."""
        held = self._sink.append(-1, b"")  # which adds nothing, and cuts off half a line
        start = max(0, held - _TAIL_BYTES)
        if held <= size and self._source.read(start, held - start) == self._sink.read(start, held - start):
            return held, held
        return unseen(self._source.read(0, size), self._sink.read(0, held)), held


def unseen(source: bytes, held: bytes) -> int:
    """The position in `source` behind its last whole line that `held` has too; 0 if they have none in common."""
    known, end = set(held.splitlines(keepends=True)), whole_length(source)
    while end:
        start = source.rfind(b"\n", 0, end - 1) + 1
        if source[start:end] in known:
            return end
        end = start
    return 0


class Mirror:
    """A thread of a node that does not lead: it sends what its ranks write, and fetches what the run has made.

    Its errors are kept in `problem`, empty while all is well, and never end the run.
    """

    def __init__(self, run: RunDir, files: Files, ranks: Sequence[int], *, every_s: float = EVERY_S) -> None:
        """ranks: those of this node. every_s: seconds between two rounds."""
        self._run, self._files, self._every_s = run, files, every_s
        self.problem = ""
        self._parts: list[Callable[[], None]] = []
        for rank in ranks:
            self._parts += [self._sent(run.event_file(rank)), self._sent(run.log_file(rank))]
            self._parts.append(_Replaced(run, files, run.pulse_file(rank)).send)
        if 0 not in ranks:
            self._parts.append(self._fetched(run.event_file(0)))
        self._parts += [self._fetched(run.path / NODES), self._fetch_result]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End with a last round, if the one before went well; may be called again."""
        self._ended.set()
        self._thread.join(_LAST_S)

    def work_once(self) -> None:
        """One round. A file that cannot be carried does not keep the others; a node that is not reached does."""
        problems = []
        for part in self._parts:
            try:
                part()
            except (Refused, OSError) as error:
                problems.append(str(error))
            except RunError as error:
                problems.append(error.message)
                break
        self.problem = problems[0] if problems else ""

    def _work(self) -> None:
        while not self._ended.wait(self._every_s):
            self.work_once()
        if not self.problem:
            self.work_once()

    def _sent(self, path: Path) -> Callable[[], None]:
        return Growth(Here(path), There(self._files, _named(self._run, path))).carry

    def _fetched(self, path: Path) -> Callable[[], None]:
        return Growth(There(self._files, _named(self._run, path)), Here(path)).carry

    def _fetch_result(self) -> None:
        """Fetch the adapter, then the result that says that it is there."""
        try:
            found, _ = self._files.get(RESULT)
        except Missing:
            return
        here = self._run.path / RESULT
        if not here.exists() or here.read_bytes() != found:
            self._fetch_adapter()
            write_atomic(here, found)

    def _fetch_adapter(self) -> None:
        listed = self._files.list(self._run.adapter.name)
        beside = self._run.path / f".{self._run.adapter.name}.{os.getpid()}"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            for path in listed:
                to = place_in(beside, path.removeprefix(f"{self._run.adapter.name}/"))
                to.parent.mkdir(parents=True, exist_ok=True)
                self._files.fetch(path, to)
            if listed:
                replace_folder(beside, self._run.adapter, aside=beside.with_name(f"{beside.name}0"))
        finally:
            shutil.rmtree(beside, ignore_errors=True)


class _Replaced:
    """A small file that is replaced again and again."""

    def __init__(self, run: RunDir, files: Files, path: Path) -> None:
        self._path, self._name, self._files = path, _named(run, path), files
        self._sent = b""

    def send(self) -> None:
        with suppress(FileNotFoundError):
            content = self._path.read_bytes()
            if content != self._sent:
                self._files.put(self._name, content, flush=False)
                self._sent = content


def send_history(files: Files, run: RunDir) -> None:
    """Add this node's lines about the run to those of a node that is to lead it and has missed some of it."""
    for path in (run.event_file(0), run.path / NODES):
        Growth(Here(path), There(files, _named(run, path))).carry()


def _named(run: RunDir, path: Path) -> str:
    return str(path.relative_to(run.path))
