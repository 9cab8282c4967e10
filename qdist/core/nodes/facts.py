"""What a node says of itself when it joins a run, before anything of the run is started."""

import msgspec

from qdist.core.machine.cluster import Cluster


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node as it finds itself."""

    node: int
    name: str
    address: str
    versions: dict[str, str]
    """Versions of Python and the packages that compute, by name: of qdist, torch, transformers, ..."""
    clock: float
    """Seconds since the epoch by the node's clock, read when it was asked."""
    free_bytes: int
    """Bytes free on the disk of the run directory."""
    cache_free_bytes: int
    """Bytes free on the disk of the cache."""
    cluster: Cluster
    gpus: int
    """GPUs (CPU ranks) that the run may use there."""
    run_id: str = ""
    """Id of the run whose files are in its run directory; empty if there are none."""
    busy: bool = False
    """Whether an agent of its node is at work in its run directory."""
    sees_shared: bool = False
    """Whether its run directory is the one that the first node writes to."""
    steps: tuple[int, ...] = ()
    """Steps of the complete checkpoints in its run directory."""
    generation: int = 0
    """Number of the last generation that it was part of; 0 before the first."""
    members: tuple[int, ...] = ()
    """Nodes of that generation, its leader first."""
    active: bool = False
    """Whether its agent has taken part in a generation since it was started."""
    resume: bool = False
    """Whether its user has said to go on with an existing run."""


class PreparedFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node has prepared: digests that must be equal on all nodes."""

    node: int
    name: str
    weights: str
    """Digest of the packed weights; empty for random ones."""
    data: str
    """Digest of the tokenized data; empty for random tokens."""
    error: str = ""
    """Why nothing could be prepared there; empty if it is."""
    try_: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the leader makes of the nodes' facts. At most one of `refuse` and `wait` is set."""

    generation: int
    members: tuple[int, ...] = ()
    """Nodes of the generation, its leader first."""
    refuse: str = ""
    """Why the run ends."""
    try_: str = ""
    wait: str = ""
    """Why these nodes do not go on by themselves."""
    run_id: str = ""
    spec: str = ""
    """Settings of a new run, as JSON; empty for one that goes on, whose plan has them."""
    step: int | None = None
    """Step of the checkpoint to go on from; None without any."""
    source: int | None = None
    """Node that gives the leader this checkpoint; None if it has it."""


class Written(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The planned run, for every node to write; or why there is none."""

    files: dict[str, str] = {}
    refuse: str = ""
    try_: str = ""
    wait: str = ""


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a node's ranks failed."""

    name: str
    message: str
    try_: str = ""
    of_others: bool = False
    """Whether it only lost its connection to other ranks."""
