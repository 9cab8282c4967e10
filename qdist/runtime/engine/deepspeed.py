"""Adapter gradients and optimizer state under DeepSpeed's ZeRO, and their unsharded form for checkpoints."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qdist.runtime.engine.adamw import (
    MOMENTS,
    allocate_moments,
    collect_moments,
    moment_key,
    optimizer_steps,
    set_rate,
)
from qdist.runtime.engine.graphs import Replayed
from qdist.runtime.engine.torch import (
    Adapter,
    Held,
    MicroBatch,
    State,
    bytes_of,
    fill_moments,
    moment_bytes,
    nothing,
    to_cpu,
)
from qdist.runtime.engine.update import Across, StepResult, finish_gradients


class DeepSpeedEngine:
    """For several ranks, or offloaded optimizer state. `engine` is what DeepSpeed made from deepspeed.json.

    group: the ranks that hold the same parameters; None for all.
    across: over the stages of a pipeline.
    """

    replayed: Replayed | None = None

    def __init__(
        self, adapter: Adapter, engine: Any, *, clip: float, group: Any = None, across: Across | None = None
    ) -> None:
        from deepspeed import utils

        self._accessors = utils
        self.adapter, self.engine, self.clip, self.across = adapter, engine, clip, across
        self.stage = engine.zero_optimization_stage()
        self.world_size = dist.get_world_size(group)
        self.optimizer = engine.optimizer.optimizer if self.stage else engine.optimizer
        """Adam itself, over flat partitions if ZeRO made them."""
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
            self.adapter.dropout_seed.write(micro_batch.seed)
            last = micro_batch is micro_batches[-1]
            loss = self.backward(micro_batch.load(), weight=weight, loss_scale=loss_scale, last=last)
            losses.append(loss.double())
        computed()
        return torch.stack(losses).sum()

    def backward(self, batch: Any, *, weight: float, loss_scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its summed loss, detached. last: no more before `step`."""
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
        """This rank's gradients: ZeRO's partition of them, or all without ZeRO."""
        yield from (parameter.grad for parameter in self.adapter.parameters())
        if self.stage:
            for group in self.engine.optimizer.averaged_gradients.values():
                yield from group or ()

    def state(self, *, wanted: bool = True) -> State:
        named = self.adapter.named()
        moments: dict[str, dict[str, torch.Tensor]] = {}
        if self.stage == 0:
            for moment, values in collect_moments(self.optimizer, named).items():
                moments[moment] = {name: to_cpu(value) for name, value in values.items()}
        elif self.optimizer.state:
            self._link_moments()
            moments = {moment: {name: self._full(p, moment) for name, p in named.items()} for moment in MOMENTS}
        return State(
            {name: self._full(parameter, None) for name, parameter in named.items()},
            moments,
            optimizer_steps(self.optimizer),
        )

    def restore(self, state: State) -> None:
        named = self.adapter.named()
        if state.moments:
            self._show_partitions()
            allocate_moments(self.optimizer, state.optimizer_steps)
            self._show_partitions(hide=True)
            self._link_moments()
        for name, parameter in named.items():
            self._take(parameter, None, state.parameters[name])
            for moment, tensors in state.moments.items() if self.stage else ():
                self._take(parameter, moment, tensors[name])
        if state.moments and self.stage == 0:
            fill_moments(self.optimizer, named, state)

    def _show_partitions(self, *, hide: bool = False) -> None:
        """Put ZeRO 3's flat partitions into Adam's groups, or hide them again: ZeRO does so only during a step."""
        if self.stage == 3:
            for index, group in enumerate(self.optimizer.param_groups):
                group["params"] = [] if hide else [self.engine.optimizer.fp32_partitioned_groups_flat[index]]

    def _link_moments(self) -> None:
        """Have ZeRO 1 and 2 find the moments: before a step they find none, and after it those of the first group.

        DeepSpeed 0.19 links the moments of all parameter groups as soon as the first has some: docs/upstream.md.
        """
        if self.stage in (1, 2):
            zero = self.engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                self._accessors.lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _key(self, moment: str) -> str:
        """Key of a moment in Adam's state."""
        return moment_key(next(iter(self.optimizer.state.values())), moment)

    def _full(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        """The full parameter, or under ZeRO moment, assembled from the partitions of all ranks."""
        if moment is not None:
            return to_cpu(self._accessors.safe_get_full_optimizer_state(parameter, self._key(moment)))
        return to_cpu(self._accessors.safe_get_full_fp32_param(parameter) if self.stage == 3 else parameter)

    def _take(self, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Store this rank's part of a full parameter, or under ZeRO of a moment."""
        with torch.no_grad():
            if self.stage == 3:
                self._take_shard(parameter, self._key(moment) if moment else None, value)
                return
            if moment is None:
                parameter.copy_(value)
                if self.stage:
                    self._accessors.safe_set_full_fp32_param(parameter, value)
            else:
                self._accessors.safe_set_full_optimizer_state(parameter, value, self._key(moment))

    def _take_shard(self, parameter: Any, key: str | None, value: torch.Tensor) -> None:
        """ZeRO 3: store this rank's equal share of a parameter or moment; the last rank's is zero-padded.

        DeepSpeed's `safe_set_full_*` fail where the shares do not come out even: docs/upstream.md.
        DeepSpeed gathers a parameter in a hook of the module that owns it, and the adapter's modules are not in its
        sight; ds_configs/zero3.json therefore keeps parameters persistent: gradients and moments are what it shards.
        """
        share = parameter.ds_tensor.numel()
        padded = torch.zeros(share * dist.get_world_size())
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, share * dist.get_rank(), share)
        if key is not None:
            self._accessors.safe_set_local_optimizer_state(parameter, mine, key)
            return
        self._accessors.safe_set_local_fp32_param(parameter, mine)
        parameter.ds_tensor.data.copy_(mine)
        if parameter.data.numel() == value.numel():  # persistent: every rank holds it whole as well
            parameter.data.copy_(value.reshape(parameter.shape))
