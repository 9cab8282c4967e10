"""What happens to a run's nodes, as lines of `RUN/nodes.jsonl` that every node of the run keeps."""

from typing import Literal

import msgspec


class NodeMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node of a generation."""

    node: int
    name: str
    address: str
    ranks: tuple[int, ...] = ()


class NodeEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line.

    formed: a generation of nodes begins to work on `members` from `step`. lost: `name` is not heard of any more.
    waiting: those who are left cannot go on alone. returned: `name` is back, and the run is about to grow.
    stopped, finished, failed: the run's end.
    """

    kind: Literal["formed", "lost", "waiting", "returned", "stopped", "finished", "failed"]
    time: float
    """Seconds since the epoch, by the clock of the node that wrote the line."""
    generation: int = 0
    node: int | None = None
    name: str = ""
    seconds: float = 0.0
    """Of 'lost': seconds since it was last heard of."""
    step: int = 0
    """Of 'formed': the step of the checkpoint that it goes on from."""
    members: tuple[NodeMember, ...] = ()
    note: str = ""
    """The sentence for the user."""
