"""Pipelined micro-batches through the stages of a group: torch.distributed.pipelining's 1F1B, one rank per stage."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from qdist.core.errors import PlanError
from qdist.core.planning.memory import STAGE_WIDTH
from qdist.runtime.data.batches import pick
from qdist.runtime.data.tokenized import IGNORED
from qdist.runtime.engine.objective import Batch, CameTo, Forward, unseen
from qdist.runtime.engine.torch import MicroBatch
from qdist.runtime.model.dropout_seed import dropout_seed_of
from qdist.runtime.placements.split.line import Line
from qdist.runtime.placements.split.stages import Grid


class Pipeline:
    """One stage of a group. All ranks of the group must call the same methods, on the same micro-batches."""

    def __init__(self, forward: Forward, grid: Grid, *, hidden_size: int, pad_id: int, device: torch.device) -> None:
        self.forward, self.grid, self.device = forward, grid, device
        self._hidden_size, self._pad_id = hidden_size, pad_id
        self.line = Line(forward, grid, hidden_size=hidden_size, device=device)
        self._stage = _StageModule(forward, grid, device)
        self._schedules: dict[tuple[int, int, int], Schedule1F1B] = {}

    def train(self, micro_batches: Sequence[MicroBatch], *, scale: float) -> torch.Tensor:
        """Forward and backward of all micro-batches, leaving gradients of scale x loss in `.grad`.

        Returns the summed loss as a float64 scalar: on the last stage, 0 on the others.
        """
        batches = self._of_one_width([micro_batch.load() for micro_batch in micro_batches])
        rows = {len(batch["input_ids"]) for batch in batches}
        if len(rows) > 1 or len(batches) < self.grid.stages:
            raise PlanError(
                f"{len(batches)} micro-batches of {sorted(rows)} samples for {self.grid.stages} stages: a pipeline "
                "takes at least one for each stage, all of one size",
                try_="--set global_batch=N with N a multiple of micro_batch times the stages",
            )
        self._stage.begin(seeds=[micro_batch.seed for micro_batch in micro_batches], batches=batches, scale=scale)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        schedule = self._schedule(len(batches), rows.pop(), ids.shape[1])
        inputs = (ids.to(self.device, non_blocking=True),) if self.grid.first else ()
        try:
            # The target only makes the schedule ask for a loss, which the last stage has computed by itself.
            schedule.step(*inputs, target=torch.zeros(len(batches)) if self.grid.last else None, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise error.__cause__ from None
            raise
        return self._stage.total

    def _of_one_width(self, batches: list[Mapping[str, torch.Tensor]]) -> list[Mapping[str, torch.Tensor]]:
        """The micro-batches of a step, padded to one of few widths; packed ones have one already."""
        if "ends" in batches[0]:
            return batches
        width = max(batch["input_ids"].shape[1] for batch in batches)
        width = -(-width // STAGE_WIDTH) * STAGE_WIDTH
        return [self._widened(batch, width) for batch in batches]

    def _widened(self, batch: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
        labels = widened(batch["labels"], width, IGNORED)
        return {"input_ids": widened(batch["input_ids"], width, self._pad_id), "labels": labels, **pick(labels)}

    @torch.no_grad()
    def evaluate(self, batches: list[list[int]], came_to: CameTo = unseen) -> tuple[float, int]:
        """(summed loss, learned tokens) over micro-batches, without dropout; (0, 0) except on the last stage."""
        samples = self.forward.samples
        losses = self.line.pass_on(map(samples.batch, batches), self._loss_of, came_to)
        return (float(sum(losses)), sum(map(samples.learned, batches))) if self.grid.last else (0.0, 0)

    def _loss_of(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.forward.loss_of(hidden, batch).double()

    def _schedule(self, count: int, rows: int, width: int) -> Schedule1F1B:
        """The schedule for one shape, with shapes and dtypes given so that stages need not exchange them."""
        key = (count, rows, width)
        if key not in self._schedules:
            grid = self.grid
            ids = torch.empty(rows, width, dtype=torch.int64, device="meta")
            hidden = torch.empty(
                rows, width, self._hidden_size, dtype=self.forward.dtype, device="meta", requires_grad=True
            )
            stage = _LeanStage(
                self._stage,
                grid.position,
                grid.stages,
                self.device,
                input_args=ids if grid.first else hidden,
                output_args=torch.empty((), device="meta", requires_grad=True) if grid.last else hidden,
                group=grid.mates,
            )
            self._schedules[key] = Schedule1F1B(stage, count, loss_fn=_already_a_loss, scale_grads=False)
        return self._schedules[key]


class _StageModule(nn.Module):
    """Called by the schedule for each micro-batch in order: hidden states in and out; the last stage returns a loss.

    The model is not a submodule: the schedule has no business with its parameters.
    """

    def __init__(self, forward: Forward, grid: Grid, device: torch.device) -> None:
        super().__init__()
        self._forward, self._grid, self._device = forward, grid, device

    def begin(self, *, seeds: list[int], batches: list[Mapping[str, torch.Tensor]], scale: float) -> None:
        self._waiting = list(zip(seeds, batches, strict=True))[::-1]
        self._scale = scale
        self.total = torch.zeros((), dtype=torch.float64, device=self._device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        seed, batch = self._waiting.pop()
        # For dropout in the model's own layers, of which stages must not draw the same masks.
        torch.manual_seed(seed + self._grid.position)
        dropout_seed_of(self._forward.model).write(seed, in_flight=True)
        hidden = self._forward.part(inputs, batch)
        if not self._grid.last:
            return hidden.to(self._forward.dtype).contiguous()
        loss = self._forward.loss_of(hidden, batch).float()
        self.total += loss.detach()
        return loss * self._scale


class _LeanStage(PipelineStage):
    """A stage whose receive buffers exist only from receiving to the end of the backward pass.

    PipelineStage (torch 2.11 to 2.13) makes one for each micro-batch of a step, twice: 2 GiB for 32 micro-batches of
    4x512 tokens of a 65B model, where no more than one a stage is in use.
    """

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._buffers_on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._buffers_on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _place(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _place(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        result = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _place(self.args_recv_info[bwd_chunk_id], "meta")
        _place(self.grad_recv_info[bwd_chunk_id], "meta")
        return result

    @contextlib.contextmanager
    def _buffers_on_meta(self) -> Iterator[None]:
        real: torch.device = vars(self)["device"]
        self.device = torch.device("meta")
        try:
            yield
        finally:
            self.device = real


def _place(received: Sequence[Any], device: Any) -> None:
    """Allocate receive buffers, or free them with device `meta`. What comes from the caller has none."""
    for info in received:
        buffer = getattr(info, "buffer", None)
        if buffer is not None:
            info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)


def widened(tensor: torch.Tensor, width: int, value: int) -> torch.Tensor:
    """[batch, length] padded on the right to [batch, width]."""
    return functional.pad(tensor, (0, width - tensor.shape[1]), value=value)


def _already_a_loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return output
