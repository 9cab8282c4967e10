"""The engine of a pipeline: a schedule computes a stage's gradients, and torch or DeepSpeed steps on them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qdist.runtime.engine.deepspeed import DeepSpeedEngine
from qdist.runtime.engine.graphs import Replayed
from qdist.runtime.engine.objective import CameTo, unseen
from qdist.runtime.engine.torch import Adapter, Held, MicroBatch, State, TorchEngine, nothing
from qdist.runtime.engine.update import StepResult
from qdist.runtime.placements.split.pipeline import Pipeline
from qdist.runtime.placements.split.stages import Grid


class PipelineEngine:
    """`inner` owns the optimizer of this stage's part of the adapter. States cover the whole adapter."""

    replayed: Replayed | None = None

    def __init__(self, pipeline: Pipeline, adapter: Adapter, inner: TorchEngine | DeepSpeedEngine) -> None:
        self.pipeline, self.adapter, self.inner = pipeline, adapter, inner

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        weight: float,
        loss_scale: float,
        computed: Callable[[], None] = nothing,
    ) -> torch.Tensor:
        loss = self.pipeline.train(micro_batches, scale=weight * loss_scale)
        computed()
        if isinstance(self.inner, DeepSpeedEngine):
            gradients = [parameter.grad for parameter in self.adapter.parameters()]
            for parameter in self.adapter.parameters():
                parameter.grad = None
            self.inner.backward(gradients, weight=1.0 / loss_scale, loss_scale=loss_scale, last=True)
        return loss

    def evaluate(self, batches: list[list[int]], came_to: CameTo = unseen) -> tuple[float, int]:
        """(summed loss, learned tokens) of this group's held-out micro-batches; (0, 0) except on the last stage."""
        return self.pipeline.evaluate(batches, came_to)

    def step(self, learning_rate: float, loss_scale: float) -> StepResult:
        return self.inner.step(learning_rate, loss_scale)

    def held(self) -> Held:
        return self.inner.held()

    def state(self, *, wanted: bool = True) -> State:
        return gather_state(self.inner.state(), self.pipeline.grid, self.pipeline.device, wanted=wanted)

    def restore(self, state: State) -> None:
        self.inner.restore(state)


class Twins(Adapter):
    """A second set of an adapter's parameters over the same memory, for DeepSpeed's hooks.

    Hooks on the model's own parameters would fire, and reduce, at each micro-batch of the schedule. `forward` takes
    the gradients that the schedule has added up, and its backward delivers them, once.
    """

    def __init__(self, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.names = adapter.names
        for name, parameter in adapter.named_parameters():
            twin = nn.Parameter(parameter.detach())
            twin.model_parallel = True  # so that DeepSpeed counts it on every stage, not on the first alone
            self.register_parameter(name, twin)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        delivered: torch.Tensor = _Deliver.apply(gradients, *self.parameters())
        return delivered


class _Deliver(torch.autograd.Function):
    """Does nothing forward; backward, returns gradients that were computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        factor = float(outer[0])
        return (None, *(gradient.mul_(factor) for gradient in gradients))


def deepspeed_over_stage(adapter: Adapter, optimizer_of: Any, config: dict[str, Any], grid: Grid) -> tuple[Twins, Any]:
    """DeepSpeed's engine over this stage's adapter and the ranks that hold the same stage.

    optimizer_of: makes the optimizer over the parameters of an adapter.
    """
    import deepspeed

    twins = Twins(adapter)
    engine, *_ = deepspeed.initialize(model=twins, optimizer=optimizer_of(twins), config=config, mpu=grid)
    # ZeRO has moved its parameters into flat buffers; the model follows.
    for parameter, twin in zip(adapter.parameters(), twins.parameters(), strict=True):
        parameter.data = twin.data
    return twins, engine


def gather_state(own: State, grid: Grid, device: torch.device, *, wanted: bool) -> State:
    """The states of all stages merged, on each rank that wants them; the others get back their own. Collective.

    Tensors travel one at a time: pickled together they would be on one GPU all at once.
    """
    flat = _flat(own)
    mates: list[Any] = [None] * grid.stages
    shapes = {key: (value.shape, value.dtype) for key, value in flat.items()}
    dist.all_gather_object(mates, (wanted, shapes), group=grid.mates)
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for taker in (position for position, (wants, _) in enumerate(mates) if wants):
        for giver, (_, theirs) in enumerate(mates):
            if grid.position == taker:
                whole |= flat if giver == taker else _received(theirs, grid, giver, device)
            elif grid.position == giver:
                for value in flat.values():
                    dist.send(value.to(device), grid.rank_at(taker), group=grid.mates)
    return _unflattened(whole, own.optimizer_steps) if wanted else own


def _received(shapes: dict[Any, Any], grid: Grid, giver: int, device: torch.device) -> dict[Any, torch.Tensor]:
    """The tensors that another stage of the group sends, in its order."""
    parts = {}
    for key, (shape, dtype) in shapes.items():
        part = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(part, grid.rank_at(giver), group=grid.mates)
        parts[key] = part.cpu()
    return parts


def _unflattened(flat: dict[tuple[str, str], torch.Tensor], optimizer_steps: int) -> State:
    parameters = {name: value for (kind, name), value in flat.items() if not kind}
    kinds = dict.fromkeys(kind for kind, _ in flat if kind)  # of another stage too: small tensors have no scales
    moments = {moment: {name: value for (kind, name), value in flat.items() if kind == moment} for moment in kinds}
    return State(parameters, moments, optimizer_steps)


def _flat(state: State) -> dict[tuple[str, str], torch.Tensor]:
    """Tensors by (moment, name); parameters have no moment."""
    flat = {("", name): value for name, value in state.parameters.items()}
    for moment, values in state.moments.items():
        flat.update({(moment, name): value for name, value in values.items()})
    return flat
