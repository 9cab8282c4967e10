"""Gradients and optimizer steps of the adapter, with plain torch or DeepSpeed; and communication between ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from qdist.runtime.engine.adamw import (
    allocate_moments,
    collect_moments,
    optimizer_steps,
    set_rate,
    update_parameters,
)
from qdist.runtime.engine.graphs import Batch, Passes, Replayed, ReplayedWork, never_room
from qdist.runtime.engine.reduction import NarrowSum
from qdist.runtime.engine.update import Across, DeviceUpdate, StepResult, finish_gradients
from qdist.runtime.model.dropout_seed import dropout_seed_of


class MicroBatch(NamedTuple):
    """One micro-batch of a step, built when needed. `seed` determines its dropout, whichever rank computes it."""

    load: Callable[[], Mapping[str, torch.Tensor]]
    seed: int


class Held(NamedTuple):
    """Bytes that training adds to a rank's adapter, on any device; after a step, and zeros before the first."""

    gradients: int
    """Bytes of gradients at the start of the last step: only this rank's part under ZeRO 2 and 3."""
    optimizer: int
    """Bytes of moments, and of ZeRO's flat fp32 copy of the parameters."""


class State(NamedTuple):
    """The adapter's state as a checkpoint holds it, independent of the number of ranks."""

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    """{'exp_avg': {name: tensor}, ...}; empty before the first step. Of 8-bit ones the bytes, and their scales."""
    optimizer_steps: int


def nothing() -> None:
    """The default callback: does nothing."""


class Engine(Protocol):
    """The training loop's interface to either engine."""

    replayed: Replayed | None
    """Replays passes as CUDA graphs, once it is started; None for an engine that launches them kernel by kernel."""

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        weight: float,
        loss_scale: float,
        computed: Callable[[], None] = nothing,
    ) -> torch.Tensor:
        """Forward and backward of all of this rank's micro-batches of a step.

        Gradients of weight x summed loss add up over micro-batches and ranks. computed: called once this rank's own
        passes are on their way, and before it waits for other ranks where it can tell the two apart.
        loss_scale: the factor that keeps fp16 gradients above underflow; undone in `step`.
        Returns the summed loss as a float64 scalar, detached; 0 where another rank of the group has it.
        """

    def step(self, learning_rate: float, loss_scale: float) -> StepResult:
        """Clip and apply the accumulated gradients."""

    def held(self) -> Held:
        """Bytes of gradients and optimizer state on this rank."""

    def state(self, *, wanted: bool = True) -> State:
        """The full state, on the CPU, if wanted here; otherwise what costs nothing. Collective: all ranks call it."""

    def restore(self, state: State) -> None:
        """Load a full state. Collective."""


class Adapter(nn.Module):
    """The model's trainable parameters under names without dots, with its loss as `forward`."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        trainable = dict(model.named_parameters())
        for name in self.names:
            self.register_parameter(name.replace(".", "/"), trainable[name])
        self._loss, self.dropout_seed = loss, dropout_seed_of(model)

    def forward(self, batch: Any) -> torch.Tensor:
        return self._loss(batch)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in the model."""
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}


class TorchEngine:
    """torch's own backward and optimizer; every rank holds the whole adapter state.

    across: over the stages of a pipeline. ranks: that compute different samples and add their gradients up, once a
    step. The gradients lie in one flat buffer then: DDP, which adds them up during the backward pass, holds them twice
    as soon as a step has several micro-batches. graphs: whether to replay the passes of a micro-batch as CUDA graphs,
    for which gradients lie so too. alike: ranks work together within passes, so all of them must launch, or all replay.
    narrow: ranks of each node, between all of which gradients cross in bfloat16; empty where they do in float32.
    """

    def __init__(
        self,
        adapter: Adapter,
        optimizer: Any,
        *,
        clip: float,
        across: Across | None = None,
        ranks: int = 1,
        narrow: Sequence[int] = (),
        graphs: bool = False,
        alike: bool = False,
    ) -> None:
        self.adapter, self.optimizer, self.clip, self.across, self.ranks = adapter, optimizer, clip, across, ranks
        own = list(adapter.parameters())
        self.gradients = _flat_gradients(own) if ranks > 1 or graphs else None
        self._narrow: NarrowSum | None = None
        if narrow and ranks > 1 and self.gradients is not None:
            self._narrow = NarrowSum(self.gradients.numel(), self.gradients.device, nodes=narrow)
        self.update: DeviceUpdate | None = None
        """The update as device work alone; None where it has to wait for the norm."""
        if optimizer.defaults.get("capturable"):
            self.update = DeviceUpdate(own, optimizer, clip=clip, across=across, flat=self.gradients)
        self._gradient_bytes = 0
        self._scale: torch.Tensor | float = torch.ones((), device=own[0].device) if graphs else 1.0
        self._replays_update = graphs and self.update is not None and own[0].is_cuda
        self._update = self._new_update()
        has_room = never_room if alike else None
        self.replayed: Replayed | None = Replayed(self._passes, own[0].device, has_room=has_room) if graphs else None

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        weight: float,
        loss_scale: float,
        computed: Callable[[], None] = nothing,
    ) -> torch.Tensor:
        self._set_scale(weight * loss_scale)
        run: Passes = self.replayed or self._passes
        losses = []
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch.seed)
            self.adapter.dropout_seed.write(micro_batch.seed)
            losses.append(run(micro_batch.load()).double())
        computed()
        if self._narrow is not None and self.gradients is not None:
            self._narrow.add_up(self.gradients, scale=loss_scale)
        elif self.ranks > 1:
            dist.all_reduce(self.gradients)
        return torch.stack(losses).sum()

    def _passes(self, batch: Batch) -> torch.Tensor:
        loss = self.adapter(batch)
        (loss * self._scale).backward()
        detached: torch.Tensor = loss.detach()
        return detached

    def _set_scale(self, scale: float) -> None:
        """The factor on losses: a graph reads it from the device."""
        if isinstance(self._scale, torch.Tensor):
            self._scale.fill_(scale)
        else:
            self._scale = scale

    def step(self, learning_rate: float, loss_scale: float) -> StepResult:
        self._gradient_bytes = bytes_of(parameter.grad for parameter in self.adapter.parameters())
        result = self._apply_gradients(learning_rate, loss_scale)
        if result.skipped and self._narrow is not None:
            self._narrow.forget()
        return result

    def _apply_gradients(self, learning_rate: float, loss_scale: float) -> StepResult:
        if self.update is not None:
            self.update.prepare(learning_rate, loss_scale)
            self._update()
            return self.update.read()
        result = finish_gradients(
            list(self.adapter.parameters()), clip=self.clip, loss_scale=loss_scale, across=self.across
        )
        if not result.skipped:
            set_rate(self.optimizer, learning_rate)
            update_parameters(self.optimizer)
        self._clear_gradients()
        return result

    def _new_update(self) -> Callable[[], None]:
        """The update, captured anew where it is replayed: a graph writes to the moments that it was captured with."""
        if self._replays_update:
            return ReplayedWork(self._launch_update, next(self.adapter.parameters()).device)
        return self._launch_update

    def _launch_update(self) -> None:
        """Device work alone: the gradients are applied, and zero for the next step."""
        assert self.update is not None
        self.update.launch()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        if self.gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.gradients.zero_()

    def held(self) -> Held:
        return Held(self._gradient_bytes, moment_bytes(self.optimizer))

    def state(self, *, wanted: bool = True) -> State:
        named = self.adapter.named()
        moments = {
            moment: {name: to_cpu(value) for name, value in values.items()}
            for moment, values in collect_moments(self.optimizer, named).items()
        }
        return State({name: to_cpu(value) for name, value in named.items()}, moments, optimizer_steps(self.optimizer))

    def restore(self, state: State) -> None:
        named = self.adapter.named()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state.parameters[name])
        if state.moments:
            allocate_moments(self.optimizer, state.optimizer_steps)
            fill_moments(self.optimizer, named, state)
            self._update = self._new_update()


def fill_moments(optimizer: Any, named: Mapping[str, nn.Parameter], state: State) -> None:
    """Copy a state's moments into an optimizer's allocated ones, over whole parameters."""
    for moment, values in collect_moments(optimizer, named).items():
        for name, value in values.items():
            value.copy_(state.moments[moment][name])


def _flat_gradients(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Zeros for the gradients of all parameters; each parameter's own gradient is a view into them."""
    flat = torch.zeros(sum(map(torch.Tensor.numel, parameters)), dtype=torch.float32, device=parameters[0].device)
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Total bytes of the tensors, skipping None."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def moment_bytes(optimizer: Any) -> int:
    """Bytes of every tensor in an optimizer's state; those that parameters share count once."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return bytes_of({id(value): value for value in tensors if isinstance(value, torch.Tensor)}.values())


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU: in float32, or of integers as they are."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


class Comm:
    """Collectives over a run's ranks. Reductions are in float64, so that rank order hardly matters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all ranks, with one reduction and one device synchronization for all."""
        parts = [torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(()) for value in values]
        packed = torch.stack(parts)
        if self.world_size > 1:
            dist.all_reduce(packed)
        summed: list[float] = packed.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()
