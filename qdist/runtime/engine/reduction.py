"""How are gradients added up over ranks in half the bytes, and yet nothing of them lost?"""

from typing import Any

import torch
import torch.distributed as dist


class NarrowSum:
    """Adds float32 numbers up over all ranks, which send each other bfloat16.

    Each rank rounds its numbers and sends every other rank that one's share of them; that rank adds its share up in
    float32, in the order of the ranks, rounds the sums and sends them to all, so that all get the same bits. What
    either rounding leaves is kept in float32 and added before the next one: over the steps nothing is lost, it comes
    later. Seide et al. 2014; with both roundings, as here, 1-bit Adam (Tang et al. 2021).

    count: of the numbers. What is kept starts at zero, also in a run that is resumed.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        ranks = dist.get_world_size()
        share = -(-count // ranks)
        self._left = torch.zeros(ranks * share, dtype=torch.float32, device=device)
        """What was left of this rank's numbers, and zeros so that all shares are of one length."""
        self._left_of_sums = torch.zeros(share, dtype=torch.float32, device=device)
        self._scale = 1.0

    def add_up(self, numbers: torch.Tensor, *, scale: float) -> None:
        """Put the sums in the place of the numbers. Collective. scale: the factor that is on all of them."""
        self._rescale(scale)
        self._left[: numbers.numel()] += numbers
        sent = _round_off(self._left)
        received = torch.empty_like(sent)
        dist.all_to_all_single(_bytes_of(received), _bytes_of(sent))
        for part in received.chunk(dist.get_world_size()):
            self._left_of_sums += part
        dist.all_gather_into_tensor(_bytes_of(received), _bytes_of(_round_off(self._left_of_sums)))
        numbers.copy_(received[: numbers.numel()])

    def forget(self) -> None:
        """Drop what was left, as after a step that was skipped: it may not be finite."""
        self._left.zero_()
        self._left_of_sums.zero_()

    def _rescale(self, scale: float) -> None:
        if scale != self._scale:
            self._left *= scale / self._scale
            self._left_of_sums *= scale / self._scale
            self._scale = scale


def _round_off(exact: torch.Tensor) -> torch.Tensor:
    """The numbers in bfloat16; what that leaves of them stays in their place."""
    rounded = exact.bfloat16()
    exact -= rounded
    return rounded


def _bytes_of(numbers: torch.Tensor) -> Any:
    """The same memory as a type that every backend sends."""
    return numbers.view(torch.uint8)
