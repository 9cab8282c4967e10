"""A run at one moment, gathered by the host and read by pure functions; and the share of arithmetic it uses (MFU)."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qdist.core.planning.plan import Plan, RankPlan
from qdist.core.spec.run_spec import memory_cap_of
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodesNow


class Reading(NamedTuple):
    """What the driver reports of one GPU; None for what it does not report."""

    name: str
    used_bytes: int
    """Bytes used by all processes together."""
    total_bytes: int
    utilization: float | None = None
    """Share of the last moment in which a kernel ran."""
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttled: str = ""
    """Why its clocks are throttled, if that is a fault: 'it is too hot'. Reaching the power limit is not."""


class Snapshot(NamedTuple):
    """A run at one moment. Times are seconds since the epoch."""

    name: str
    plan: Plan
    fold: RunHistory
    state: str
    """planned, running, finished, stopped, failed or killed."""
    now: float
    pulses: Mapping[int, Heartbeat] = {}
    troubles: tuple[str, ...] = ()
    """Ranks that are stuck, as sentences, the cause first."""
    message: str = ""
    """The error that ended the run."""
    try_: str = ""
    stopping: bool = False
    """Whether it was asked to stop, and will once its step is done and saved."""
    cards: Mapping[int, tuple[Reading, ...]] = {}
    """Driver readings of each rank on this machine, aligned with its GPUs."""
    card_bytes: tuple[int, ...] = ()
    """Bytes of each GPU as detected at launch, node by node."""
    first_cards: tuple[int, ...] = ()
    """Position in `card_bytes` of each node's first GPU; empty for one machine."""
    matmul_flops_s: float | None = None
    """16-bit matmul FLOP/s of the slowest GPU; None on CPU and for an unknown card."""
    log_rank: int = 0
    log: tuple[str, ...] = ()
    """The last lines of that rank's log."""
    all_logs: bool = False
    """Whether the logs of all ranks were asked for."""
    logs: Mapping[int, tuple[str, ...]] = {}
    """The last lines of their logs, by rank, those first that were written to last."""
    nodes: NodesNow | None = None
    """The run's nodes; None for a run of one machine."""

    @property
    def node_of_rank(self) -> Mapping[int, str]:
        """Name of each rank's node; empty for a run of one machine, and for one that was resumed on one."""
        names = self.nodes.name_of_rank if self.nodes else {}
        return names if len(names) == self.plan.world_size else {}


class Row(NamedTuple):
    """One GPU of a rank, or a rank on CPUs; None for unknown values."""

    rank: int
    gpu: int | None
    now_bytes: int | None
    peak_bytes: int | None
    expected_bytes: int
    """Predicted peak bytes."""
    limit_bytes: int | None
    """Bytes that it may fill; None on CPU, where ranks share the machine's memory."""
    tokens_per_s: float | None
    """Tokens/s of the rank's own micro-batches."""
    busy_s: float | None
    beat_s: float | None
    """Seconds since its last heartbeat."""
    at: str
    card: Reading | None
    node: str = ""
    """Name of its node; empty for a run of one machine."""

    @property
    def label(self) -> str:
        """'rank 1', or 'GPU 3 of rank 1' where the numbers differ; 'rank 1 on b' in a run of several nodes."""
        where = f" on {self.node}" if self.node else ""
        gpu = "" if self.gpu in (None, self.rank) else f"GPU {self.gpu} of "
        return f"{gpu}rank {self.rank}{where}"


def rows(snapshot: Snapshot) -> list[Row]:
    """A row per GPU, or per CPU rank, in rank order."""
    names = snapshot.node_of_rank
    down = snapshot.nodes.down if snapshot.nodes and snapshot.state == "running" else ()
    found: list[Row] = []
    for rank in snapshot.plan.ranks:
        node = names.get(rank.rank, "")
        found += _rows_of(snapshot, rank, node=node, is_lost=node in down)
    return found


def _rows_of(snapshot: Snapshot, rank: RankPlan, *, node: str, is_lost: bool) -> Iterator[Row]:
    said, pulse = snapshot.fold.ranks.get(rank.rank), snapshot.pulses.get(rank.rank)
    readings = snapshot.cards.get(rank.rank, ())
    # A process on several GPUs says the peak of the fullest, and the sum of what it holds now.
    fullest = max(range(len(rank.expected)), key=lambda index: rank.expected[index].total)
    for index, expected in enumerate(rank.expected):
        card = readings[index] if index < len(readings) else None
        if len(rank.expected) == 1:
            held = pulse.memory_bytes if pulse and snapshot.state == "running" else 0
        else:
            held = card.used_bytes if card else 0
        gpu = rank.gpus[index] if rank.gpus else None
        total = _card_bytes(snapshot, rank, gpu)
        yield Row(
            rank=rank.rank,
            gpu=gpu,
            now_bytes=held or None,
            peak_bytes=(said.memory_bytes or None) if said and index == fullest else None,
            expected_bytes=expected.total,
            limit_bytes=None if gpu is None else memory_cap_of(snapshot.plan.spec, gpu) or total,
            tokens_per_s=said.tokens_per_s if said and index == 0 else None,
            busy_s=said.busy_s if said and index == 0 else None,
            beat_s=max(0.0, snapshot.now - pulse.time) if pulse else None,
            at="its node is lost" if is_lost else str(pulse) if pulse else "no sign of life yet",
            card=card,
            node=node,
        )


def _card_bytes(snapshot: Snapshot, rank: RankPlan, gpu: int | None) -> int | None:
    """Bytes of a rank's GPU, which its node numbers from 0; None on CPU, and if that is unknown."""
    if gpu is None:
        return None
    first = snapshot.first_cards[rank.node] if rank.node < len(snapshot.first_cards) else 0
    return snapshot.card_bytes[first + gpu] if first + gpu < len(snapshot.card_bytes) else None


def model_flops_per_token(plan: Plan) -> float:
    """Floating-point operations that a token needs, forward and backward, whatever the implementation does.

    The convention is PaLM's (appendix B) for frozen weights: 2 a weight forward and 2 backward, since no gradient of
    a frozen weight is made; 6 an adapter parameter; causal attention scores over half of `seq_len`, forward once and
    backward twice. The head counts as a weight, the embedding's look-up as nothing, recomputation as nothing. Of
    experts and their adapters those count that a token visits.
    """
    facts = plan.facts
    weights = facts.active_weights + facts.vocab * facts.hidden
    scores = 6 * plan.seq_len * sum(run.count * run.shape.heads * run.shape.head_dim for run in facts.layers)
    return 4.0 * weights + 6 * plan.active_adapter_parameters + scores


def mfu(snapshot: Snapshot, tokens_per_s: float | None) -> float | None:
    """Model FLOP/s as a share of the sustained 16-bit matmul rate of all GPUs; None if either is unknown."""
    gpus = sum(len(rank.gpus) for rank in snapshot.plan.ranks)
    if not gpus or not snapshot.matmul_flops_s or tokens_per_s is None:
        return None
    return tokens_per_s * model_flops_per_token(snapshot.plan) / (gpus * snapshot.matmul_flops_s)
