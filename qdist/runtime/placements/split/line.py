"""Passes without gradients through the stages of a group: one batch behind the other."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from qdist.runtime.engine.objective import Batch, CameTo, Passes, unseen
from qdist.runtime.placements.split.stages import Grid


class Line:
    """One stage of a group. All ranks of the group must call the same methods, on the same batches."""

    def __init__(self, passes: Passes, grid: Grid, *, hidden_size: int, device: torch.device) -> None:
        self._passes, self._grid, self._hidden_size, self._device = passes, grid, hidden_size, device

    def score(self, batches: Iterable[Batch], came_to: CameTo = unseen) -> list[torch.Tensor]:
        """`ScoreBatches` of a stage: the last one has the answers."""
        return self.pass_on(batches, lambda hidden, batch: self._passes.scores_of(hidden, batch).cpu(), came_to)

    @torch.no_grad()
    def pass_on(
        self,
        batches: Iterable[Batch],
        finish: Callable[[torch.Tensor, Batch], torch.Tensor],
        came_to: CameTo = unseen,
    ) -> list[torch.Tensor]:
        """What the last stage makes of each batch's hidden states, without dropout; nothing on the others.

        A stage goes on with the next batch while its successor has this one.
        """
        finished: list[torch.Tensor] = []
        sent: list[Any] = []
        with self._passes.without_dropout():
            for count, batch in enumerate(batches, 1):
                came_to(count)
                hidden = self._passes.part(self._received(batch), batch)
                if self._grid.last:
                    finished.append(finish(hidden, batch))
                    continue
                _wait(sent)
                sent = self._exchange(dist.isend, hidden.to(self._passes.dtype).contiguous(), +1)
            _wait(sent)
        return finished

    def _received(self, batch: Batch) -> torch.Tensor:
        if self._grid.first:
            return batch["input_ids"].to(self._device)
        shape = (*batch["input_ids"].shape, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._passes.dtype, device=self._device)
        _wait(self._exchange(dist.irecv, hidden, -1))
        return hidden

    def _exchange(self, operation: Any, tensor: torch.Tensor, neighbour: int) -> list[Any]:
        peer = dist.get_rank() + neighbour
        return [*dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer, self._grid.mates)]), tensor]


def _wait(works: list[Any]) -> None:
    """Wait for transfers; the list's last entry is the tensor, kept alive until now."""
    for work in works[:-1]:
        work.wait()
