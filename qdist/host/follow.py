"""What the ranks of a run have said since last asked."""

from heapq import merge
from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.events import Event, decode_lines, whole_length


class Follower:
    """Reads `<run>/events/rank*.jsonl` as they grow. A line that is still being written waits for its end.

    The run may not have started: files and the folder itself may appear later.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "events"
        self._read_bytes: dict[Path, int] = {}
        self._read_lines: dict[Path, int] = {}

    def new_events(self) -> list[Event]:
        """Events since the last call, by time; those of one rank stay in the order written.

        Raises RunError, naming file and line, where a whole line is not an event.
        """
        streams = [self._advance(path) for path in sorted(self._folder.glob("rank*.jsonl"))]
        return list(merge(*streams, key=lambda event: event.time))

    def _advance(self, path: Path) -> list[Event]:
        offset, lines = self._read_bytes.get(path, 0), self._read_lines.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        try:
            events = decode_lines(data, first_line=lines + 1)
        except RunError as error:
            raise RunError(f"{path}: {error.message}", try_=error.try_) from error
        self._read_bytes[path] = offset + whole_length(data)
        self._read_lines[path] = lines + len(events)
        return events
