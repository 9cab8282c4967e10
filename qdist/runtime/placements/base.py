"""The interface of a rank in any placement: its part of the backbone, engine, share of data, adapter and answers.

A placement is one module here, or one folder, and one module in `qdist.core.planning.placements`; nobody else asks
which one a plan has. tests/runtime/placements/test_conformance.py runs all of them through these promises.
"""

import datetime
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from qdist.core.planning.plan import Plan
from qdist.runtime.engine.adamw import build_optimizer
from qdist.runtime.engine.deepspeed import DeepSpeedEngine
from qdist.runtime.engine.objective import Evaluate, Forward, Passes, ScoreBatches
from qdist.runtime.engine.torch import Adapter, Engine, TorchEngine

PROCESS_GROUP_TIMEOUT = datetime.timedelta(minutes=30)
"""Long enough for rank 0 to write answers and checkpoints while the others wait."""


class Built(NamedTuple):
    """The engine and evaluations that the training loop uses."""

    engine: Engine
    evaluate: Evaluate
    score: ScoreBatches


class Placement(Protocol):
    """One rank of a placed run. Methods marked collective must be called by all ranks of the run."""

    plan: Plan
    rank: int
    devices: tuple[torch.device, ...]
    """This rank's devices, in plan order; the first also holds whatever is not assigned to another."""

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of a step's micro-batches, out of `plan.data_parallel`."""

    @property
    def adapter_parts(self) -> int:
        """Ranks `r` and `r + adapter_parts` hold the same adapter parameters; 1 where all ranks do."""

    @property
    def can_answer(self) -> bool:
        """Whether this rank helps generate the answers of a finished run."""

    @property
    def in_step(self) -> bool:
        """Whether ranks exchange weights in each pass, so that all must make the same number of passes."""

    def arrange(self, model: Any) -> None:
        """Remove or shard what this rank does not hold and assign devices to the rest, while `model` has no storage."""

    def settle(self, backbone: Any) -> None:
        """Finish a backbone after its weights were loaded. Collective."""

    def verify(self, backbone: Any) -> int:
        """Bytes gathered and verified against what the ranks hold; 0 if nothing is gathered. Collective.

        Raises JobError naming the tensor where they differ.
        """

    def sums_share(self) -> tuple[int, int]:
        """(index, count): the share of the recorded checksums that this rank verifies."""

    def build(self, accelerator: Any, adapter: Adapter, forward: Forward) -> Built:
        """The engine over this rank's adapter parameters, and its evaluations. Collective.

        accelerator: as `setup.make_accelerator` makes it. forward: over a model that was arranged by this placement.
        """

    def scoring(self, passes: Passes) -> ScoreBatches:
        """What scores batches with a model that was arranged by this placement, without training it. Collective.

        The ranks with the same `data_rank` must be given the same batches; and where ranks are `in_step`, all as many.
        """


class LoneRank:
    """The interface for a rank that computes its passes alone and has the whole adapter."""

    in_step = False

    def __init__(self, plan: Plan, rank: int, devices: tuple[torch.device, ...]) -> None:
        self.plan, self.rank, self.devices = plan, rank, devices

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def adapter_parts(self) -> int:
        return 1

    @property
    def can_answer(self) -> bool:
        return self.rank == 0

    def arrange(self, model: Any) -> None:
        pass

    def settle(self, backbone: Any) -> None:
        pass

    def verify(self, backbone: Any) -> int:
        return 0

    def sums_share(self) -> tuple[int, int]:
        return 0, 1

    def build(self, accelerator: Any, adapter: Adapter, forward: Forward) -> Built:
        return Built(make_engine(self.plan, accelerator, adapter), forward.evaluate, self.scoring(forward))

    def scoring(self, passes: Passes) -> ScoreBatches:
        return passes.score


def make_engine(plan: Plan, accelerator: Any, adapter: Adapter) -> Engine:
    """The engine named in the plan, over only a whole adapter's parameters."""
    clip, optimizer = plan.spec.optim.clip, optimizer_maker(plan)(adapter)
    if plan.engine == "torch":
        return TorchEngine(
            adapter,
            optimizer,
            clip=clip,
            ranks=plan.data_parallel,
            narrow=plan.world.ranks_of_nodes if plan.spec.optim.reduce_dtype == "bfloat16" else (),
            graphs=plan.graphs,
            alike=plan.placement == "shard",
        )
    engine, _ = accelerator.prepare(adapter, optimizer)
    return DeepSpeedEngine(adapter, engine, clip=clip)


def optimizer_maker(plan: Plan) -> Callable[[Adapter], Any]:
    """A function that builds the planned optimizer over an adapter's parameters."""
    optim, fused = plan.spec.optim, plan.device == "cuda" and plan.spec.zero.offload == "none"
    one_device = all(len(rank.gpus) == 1 for rank in plan.ranks)
    build = partial(
        build_optimizer,
        name=plan.optimizer,
        fused=fused,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        ratio_b=optim.lr_ratio_b,
        capturable=fused and one_device and plan.engine == "torch" and plan.optimizer == "adamw",
    )
    return lambda adapter: build(adapter.named())
