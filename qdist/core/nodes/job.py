"""What a node's agent is started with, and what it says while it works: the words between launcher and agent."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

TOKEN, TOKEN_FILE = "QDIST_TOKEN", "QDIST_TOKEN_FILE"
"""Environment variables that hold the run's token, or the path of a file that does; it is on no command line."""
KEEPS = "QDIST_KEEPS_CHECKPOINTS"
"""Environment variable of a rank that writes checkpoints into a run directory of its own node: '1' or absent."""
PREPARED = "QDIST_PREPARED"
"""Environment variable of a rank: file of what its node has prepared; absent where that lies as the plan says."""
REJOIN_S = 600.0
"""Usual seconds that nodes wait for others which they cannot go on without."""
STILL_THERE = 75
"""Exit code of an agent that found another of its node at work in the run directory."""
LEFT = 4
"""Exit code of an agent that was told by SIGTERM to leave the run, which goes on without it where it may."""
STOPPED = 3
"""Exit code of an agent whose run was stopped with a checkpoint; 0 if the run is finished, 1 if it failed."""


class NodeJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's part in a run, as JSON on the standard input of `python -m qdist.runtime.nodes.agent`."""

    run: str
    """The run directory: the same absolute path on every node, on one shared disk or on each node's own."""
    node: int
    """Number of the node in the run, from 0, in the order of the hosts."""
    name: str
    """What sentences call it."""
    address: str
    """Its own address, on which its sockets listen."""
    endpoints: tuple[str, ...]
    """HOST:PORT of the rendezvous, in the order in which they are tried. One for each node where any may serve it, in
    the nodes' order; a single one if only the node of that address may."""
    least: int
    """Fewest nodes to go on with."""
    most: int
    token: str
    """Shared secret of the run."""
    settings: Mapping[str, Any] = {}
    """Nested settings of a new run over nothing, recipe included; the changes to a resumed one."""
    resume: bool = False
    """Whether an existing run goes on; otherwise a run directory that is in use is refused."""
    gpus: int | None = None
    """GPUs (CPU ranks) of this node; None for all (one)."""
    rejoin_s: float = REJOIN_S
    """Seconds to wait for nodes that the run cannot go on without."""
    attached: bool = True
    """Whether the agent ends with the process that started it. One started by ssh outlives its connection."""


class AgentLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of JSON on an agent's standard output."""

    kind: Literal["say", "error", "planned", "ended"]
    text: str = ""
    """A line for the user; of an error its sentence."""
    try_: str = ""
    generation: int = 0
