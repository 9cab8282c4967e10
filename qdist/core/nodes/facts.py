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
    """Nodes of that generation."""


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
