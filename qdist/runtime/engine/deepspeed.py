"""Adapter gradients and optimizer state under DeepSpeed's ZeRO, and their full form for checkpoints."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qdist.runtime.engine.torch import (
    MOMENTS,
    Across,
    Adapter,
    Held,
    MicroBatch,
    State,
    StepResult,
    allocate_moments,
    bytes_of,
    finish_gradients,
    moment_bytes,
    moment_of,
    nothing,
    optimizer_steps,
    set_rate,
    to_cpu,
)


class DeepSpeedEngine:
    """Several ranks, or offloaded optimizer state. `engine` is what DeepSpeed made from deepspeed.json.

    group: the ranks that hold the same parameters; None for all.
    across: over the stages of a pipeline.
    """

    def __init__(
        self, adapter: Adapter, engine: Any, *, clip: float, group: Any = None, across: Across | None = None
    ) -> None:
        self.adapter, self.engine, self.clip, self.group, self.across = adapter, engine, clip, group, across
        self.stage = engine.zero_optimization_stage()
        self.world_size = dist.get_world_size(group)
        self.optimizer = engine.optimizer.optimizer if self.stage else engine.optimizer
        """Adam itself, over flat partitions where ZeRO made them."""
        self._gradient_bytes = 0
        if self.stage == 3:
            parameters: list[Any] = list(adapter.parameters())
            parameters[0].all_gather(param_list=parameters)

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        weight: float,
        loss_scale: float,
        computed: Callable[[], None] = nothing,
    ) -> torch.Tensor:
        losses = []
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch.seed)
            last = micro_batch is micro_batches[-1]
            loss = self.backward(micro_batch.load(), weight=weight, loss_scale=loss_scale, last=last)
            losses.append(loss.double())
        computed()
        return torch.stack(losses).sum()

    def backward(self, batch: Any, *, weight: float, loss_scale: float, last: bool) -> torch.Tensor:
        """One micro-batch. last: no further one before `step`. Returns its summed loss, detached."""
        if self.stage:
            self.engine.optimizer.override_loss_scale(loss_scale)
        else:
            weight *= loss_scale
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(batch)
        # DeepSpeed averages over ranks; the weights already add up to one over all of them.
        self.engine.backward(loss * (weight * self.world_size), scale_wrt_gas=False)
        return loss.detach()

    def step(self, learning_rate: float, loss_scale: float) -> StepResult:
        set_rate(self.optimizer, learning_rate)
        self._gradient_bytes = bytes_of(self._own_gradients())
        if self.stage == 0:
            result = finish_gradients(
                list(self.adapter.parameters()), clip=self.clip, loss_scale=loss_scale, across=self.across
            )
            if result.skipped:
                self.engine.zero_grad()
                return result
            self.engine.step()
            return result
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        return StepResult(float("inf") if skipped else float(self.engine.get_global_grad_norm()), skipped)

    def held(self) -> Held:
        flat: list[torch.Tensor] = []
        if self.stage:
            zero = self.engine.optimizer
            flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return Held(self._gradient_bytes, moment_bytes(self.optimizer) + bytes_of(flat))

    def _own_gradients(self) -> Iterable[torch.Tensor | None]:
        """What ZeRO has left of the gradients on this rank; all of them without it."""
        yield from (parameter.grad for parameter in self.adapter.parameters())
        if self.stage:
            for group in self.engine.optimizer.averaged_gradients.values():
                yield from group or ()

    def state(self) -> State:
        named = self.adapter.named()
        moments = {}
        if self.optimizer.state:
            moments = {moment: {name: self._full(p, moment) for name, p in named.items()} for moment in MOMENTS}
        return State(
            {name: self._full(parameter, None) for name, parameter in named.items()},
            moments,
            optimizer_steps(self.optimizer),
        )

    def restore(self, state: State) -> None:
        if state.moments:
            self._show_partitions()
            allocate_moments(self.optimizer, state.optimizer_steps)
            self._show_partitions(hide=True)
        for name, parameter in self.adapter.named().items():
            self._take(parameter, None, state.parameters[name])
            for moment, tensors in state.moments.items():
                self._take(parameter, moment, tensors[name])

    def _show_partitions(self, *, hide: bool = False) -> None:
        """ZeRO 3 puts its flat partitions into Adam's groups for the length of a step only."""
        if self.stage == 3:
            for index, group in enumerate(self.optimizer.param_groups):
                group["params"] = [] if hide else [self.engine.optimizer.fp32_partitioned_groups_flat[index]]

    def _full(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        """The whole of a parameter or moment, from the partitions of all ranks."""
        if self.stage == 0:
            return to_cpu(parameter if moment is None else moment_of(self.optimizer.state[parameter], moment))
        if self.stage == 3:
            shard = _Shard(self.engine.optimizer, parameter, self.optimizer)
            return to_cpu(shard.gather(moment)).reshape(shard.shape)
        if moment is None:
            return to_cpu(parameter)
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        mapping = parameter._hp_mapping
        if mapping is not None:
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            source = self._flat(moment).narrow(0, flat.start, flat.numel)
            whole.narrow(0, inside.start, inside.numel).copy_(source)
        dist.all_reduce(whole, group=self.group)
        return to_cpu(whole).reshape(parameter.shape)

    def _take(self, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Keep this rank's part of a whole parameter or moment."""
        with torch.no_grad():
            if self.stage == 3:
                _Shard(self.engine.optimizer, parameter, self.optimizer).scatter(moment, value)
                return
            if moment is None:
                parameter.copy_(value)
            if self.stage == 0:
                if moment is not None:
                    moment_of(self.optimizer.state[parameter], moment).copy_(value)
                return
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                self._flat(moment).narrow(0, flat.start, flat.numel).copy_(
                    value.flatten().narrow(0, inside.start, inside.numel)
                )

    def _flat(self, moment: str | None) -> torch.Tensor:
        """ZeRO 1 and 2: this rank's flat partition of the parameters or of a moment."""
        partition: torch.Tensor = self.engine.optimizer.single_partition_of_fp32_groups[0]
        return partition.data if moment is None else moment_of(self.optimizer.state[partition], moment)


class _Shard:
    """ZeRO 3: this rank's equal share of one parameter, the last rank's padded with zeros.

    DeepSpeed gathers a parameter in a hook of the module that owns it, and the adapter's modules are not in its
    sight; ds_configs/zero3.json therefore keeps parameters persistent, and gradients and moments are what it shards.
    """

    def __init__(self, zero: Any, parameter: Any, adam: Any) -> None:
        self.parameter, self.adam, self.shape = parameter, adam, parameter.ds_shape
        group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
        self.flat, self.start, self.numel = zero.fp32_partitioned_groups_flat[group], start, numel

    def _part(self, moment: str | None) -> torch.Tensor:
        whole = self.flat.data if moment is None else moment_of(self.adam.state[self.flat], moment)
        return whole.narrow(0, self.start, self.numel)

    def gather(self, moment: str | None) -> torch.Tensor:
        part = self._part(moment).to(self.parameter.device).contiguous()  # paged moments look like CPU tensors
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: self.parameter.ds_numel]

    def scatter(self, moment: str | None, value: torch.Tensor) -> None:
        padded = torch.zeros(self.numel * dist.get_world_size())
        padded[: self.parameter.ds_numel] = value.flatten()
        mine = padded.narrow(0, self.numel * dist.get_rank(), self.numel)
        self._part(moment).copy_(mine)
        if moment is None:
            self.parameter.ds_tensor.data.copy_(mine)
            if self.parameter.data.numel() == value.numel():  # persistent: every rank holds it whole as well
                self.parameter.data.copy_(value.reshape(self.parameter.shape))
