"""How are gradients added up over ranks in half the bytes, and yet nothing of them lost?"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from qdist.core.machine.world import is_even


class NarrowSum:
    """Adds float32 numbers up over all ranks, which send each other bfloat16.

    Each rank rounds its numbers and sends every other rank that one's share of them; that rank adds its share up in
    float32, in the order of the ranks, rounds the sums and sends them to all, so that all get the same bits. What
    either rounding leaves is kept in float32 and added before the next one: over the steps nothing is lost, it comes
    later. Seide et al. 2014; with both roundings, as here, 1-bit Adam (Tang et al. 2021).

    Where nodes have as many ranks each, those of a node add up in float32 first, and each does the above for its part
    of the numbers, with those of its place on the other nodes: a node then sends what one rank would.

    count: of the numbers. nodes: ranks of each. What is kept starts at zero, also in a run that is resumed. Collective.
    """

    def __init__(self, count: int, device: torch.device, *, nodes: Sequence[int]) -> None:
        self._mates, self._peers = _groups_over(nodes)
        parts, ranks = dist.get_world_size(self._mates) if self._mates else 1, dist.get_world_size(self._peers)
        share = -(-count // (parts * ranks))
        self._ranks, self._parts, self._length = ranks, parts, ranks * share
        self._first = self._length * (dist.get_rank(self._mates) if self._mates else 0)
        self._left = torch.zeros(self._length, dtype=torch.float32, device=device)
        """What was left of this rank's numbers, and zeros so that all shares are of one length."""
        self._left_of_sums = torch.zeros(share, dtype=torch.float32, device=device)
        self._scale = 1.0

    def add_up(self, numbers: torch.Tensor, *, scale: float) -> None:
        """Put the sums in the place of the numbers. Collective. scale: the factor that is on all of them."""
        self._rescale(scale)
        if self._mates:
            dist.all_reduce(numbers, group=self._mates)
        sums = self._over_peers(numbers[self._first : self._first + self._length])
        if self._mates:
            own, sums = sums, sums.new_empty(self._parts * self._length)
            dist.all_gather_into_tensor(_bytes_of(sums), _bytes_of(own), group=self._mates)
        numbers.copy_(sums[: numbers.numel()])

    def _over_peers(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sums of numbers, and of zeros after them up to a common length, in bfloat16."""
        self._left[: numbers.numel()] += numbers
        sent = _round_off(self._left)
        received = torch.empty_like(sent)
        dist.all_to_all_single(_bytes_of(received), _bytes_of(sent), group=self._peers)
        for part in received.chunk(self._ranks):
            self._left_of_sums += part
        dist.all_gather_into_tensor(_bytes_of(received), _bytes_of(_round_off(self._left_of_sums)), group=self._peers)
        return received

    def forget(self) -> None:
        """Drop what was left, as after a step that was skipped: it may not be finite."""
        self._left.zero_()
        self._left_of_sums.zero_()

    def _rescale(self, scale: float) -> None:
        if scale != self._scale:
            self._left *= scale / self._scale
            self._left_of_sums *= scale / self._scale
            self._scale = scale


def _groups_over(nodes: Sequence[int]) -> tuple[Any, Any]:
    """(the ranks of this node, those of the same place on all nodes); (None, all ranks) where that makes no sense."""
    if not is_even(nodes):
        return None, dist.group.WORLD
    count = nodes[0]
    mates, _ = dist.new_subgroups(count)
    same_place = [[node * count + place for node in range(len(nodes))] for place in range(count)]
    peers, _ = dist.new_subgroups_by_enumeration(same_place)
    return mates, peers


def _round_off(exact: torch.Tensor) -> torch.Tensor:
    """The numbers in bfloat16; what that leaves of them stays in their place."""
    rounded = exact.bfloat16()
    exact -= rounded
    return rounded


def _bytes_of(numbers: torch.Tensor) -> Any:
    """The same memory as a type that every backend sends."""
    return numbers.view(torch.uint8)
