"""What has happened to a run's nodes, as this node's run directory has it."""

from collections.abc import Iterator

import msgspec

from qdist.core.errors import RunError
from qdist.core.telemetry.nodes import NodeEvent, NodesNow, fold_nodes
from qdist.core.text import resuming
from qdist.host.opening import readable
from qdist.host.run.rundir import NODES, RunDir


def node_events(run: RunDir) -> list[NodeEvent]:
    """Every event in the order of the file; none for a run of one machine.

    Lines that are no events are left out: the last one may be torn, and a later qdist may write other kinds.
    """
    path = run.path / NODES
    if not path.is_file():
        return []
    with readable(path, RunError):
        return list(_decoded(path.read_bytes()))


def _decoded(data: bytes) -> Iterator[NodeEvent]:
    decoder = msgspec.json.Decoder(NodeEvent)
    for line in data.splitlines():
        # An agent that was killed may have left half a line, which the next one went on behind.
        start = max(0, line.rfind(b'{"kind":'))
        try:
            yield decoder.decode(line[start:])
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def nodes_now(run: RunDir) -> NodesNow | None:
    """The run's nodes as far as known; None for a run of one machine."""
    return fold_nodes(node_events(run))


def how_to_resume(run: RunDir, nodes: NodesNow | None) -> str:
    """The command that goes on with a run, and what one of several nodes needs besides: alone it is of one machine."""
    again = resuming(run.path)
    return f"{again}, with --hosts or --nnodes as it was launched" if nodes and nodes.members else again


class NodesReader:
    """Knows a run's nodes at any time, and reads their file only when it has changed: that of many nodes is long."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._stamp: tuple[int, int] | None = None
        self._known: NodesNow | None = None

    def now(self) -> NodesNow | None:
        """The run's nodes; None for a run of one machine."""
        try:
            there = (self._run.path / NODES).stat()
        except FileNotFoundError:
            return None
        if (stamp := (there.st_mtime_ns, there.st_size)) != self._stamp:
            self._stamp, self._known = stamp, nodes_now(self._run)
        return self._known
