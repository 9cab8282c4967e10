"""What do kernels take: of the GPU at its full clock, and of Python, which launches them one by one?"""

from collections.abc import Iterable
from math import sqrt

import msgspec

from qdist.core.machine.cluster import Rates
from qdist.core.planning.memory import TrainingShape

FLOAT32_SLOWDOWN = 15
"""Slowdown of 32-bit matrix products over 16-bit ones: they do not use the matrix units."""
OTHER_POWER = 0.8
"""Power that kernels other than dense products draw, as a share of what a card may: an estimate,
raised from 0.7 on the rows of 16x512, which it makes 1.5 % slower."""
LINEAR_LAUNCHES = 22
"""Launches that the seconds of `Rates.linear_s` are divided by: an adapted linear's kernels, 6 forward and 13 backward,
and as much as three for Python's part of it."""


class Cost(msgspec.Struct, frozen=True):
    """The time of some kernels of one pass."""

    dense_s: float = 0.0
    """GPU seconds of dense products, in which a card draws the most power, at its full clock."""
    other_s: float = 0.0
    """GPU seconds of all other kernels, and from each to the next."""
    launches: float = 0.0
    """Python's time to launch them, as a multiple of that for a kernel of an adapted linear."""

    @property
    def gpu_s(self) -> float:
        """Seconds of the GPU at its full clock."""
        return self.dense_s + self.other_s

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.dense_s + other.dense_s, self.other_s + other.other_s, self.launches + other.launches)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.dense_s * times, self.other_s * times, self.launches * times)


NOTHING = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    """What kernels take that run one after the other."""
    return sum(costs, NOTHING)


def clock(cost: Cost, rates: Rates) -> float:
    """Share of the full clock at which a card runs these kernels over and over.

    Dense products alone draw so much power that the clock falls to the sustained rate. Power is taken to grow with the
    square of the clock; other kernels draw `OTHER_POWER`. A 7B at 16x512 on an H200: 398 ms of kernels in one step
    after a pause, 440 in step after step, where this has 0.91.
    """
    if not cost.gpu_s:
        return 1.0
    dense = cost.dense_s / cost.gpu_s
    most = (rates.of_kernels.dense_flops_s / rates.matmul_flops_s) ** 2
    return min(1.0, 1 / sqrt(dense * most + (1 - dense) * OTHER_POWER))


class Kernels:
    """The kernels of a run's micro-batches, each with its cost: its work at the card's rates, and a launch."""

    def __init__(self, rates: Rates, job: TrainingShape, tokens: int, *, packed: bool = False) -> None:
        """packed: whether a row holds several samples, which attention keeps apart."""
        self.rates, self.job, self.tokens, self.packed = rates.of_kernels, job, tokens, packed
        self.memory_bytes_s = rates.memory_bytes_s
        self.slow = FLOAT32_SLOWDOWN if job.compute_bytes == 4 else 1

    def product(self, inputs: int, outputs: int, *, tokens: int = 0, fp8: bool = False) -> Cost:
        """A dense product of [tokens, inputs] with a matrix; bounded by its arithmetic, or by reading the matrix."""
        tokens = tokens or self.tokens
        rate = self.rates.fp8_flops_s if fp8 and self.rates.fp8_flops_s else self.rates.dense_flops_s / self.slow
        moved = self.job.compute_bytes * (inputs * outputs + tokens * (inputs + outputs)) / (1 + fp8)
        arithmetic = 2 * tokens * inputs * outputs / rate
        if arithmetic < moved / self.memory_bytes_s:
            return Cost(other_s=moved / self.memory_bytes_s + self.rates.product_s, launches=1)
        return Cost(dense_s=arithmetic, other_s=self.rates.product_s, launches=1)

    def grouped(self, weights: int, pairs: int, matrices: float) -> Cost:
        """A product of each of `pairs` rows with one of several matrices of so many weights."""
        arithmetic = 2 * pairs * weights / (self.rates.grouped_flops_s / self.slow)
        read = self.job.compute_bytes * matrices * weights / self.memory_bytes_s
        return Cost(dense_s=arithmetic, other_s=max(0.0, read - arithmetic) + self.rates.product_s, launches=1)

    def thin(self, wide: float, rank: int) -> Cost:
        """A product of a tensor, `wide` elements a token, with a matrix of a rank's width."""
        return self._moved(wide + rank, self.rates.thin_bytes_s, kernels=1.5)  # some sum up parts in a second kernel

    def added(self, wide: float, rank: int) -> Cost:
        """Such a product with the other side, added to a tensor of `wide` elements a token."""
        return self._moved(2 * wide + rank, self.rates.added_bytes_s)

    def elementwise(self, accesses: float, *, kernels: float = 1) -> Cost:
        """Kernels that read and write so many elements a token altogether, as often as they do."""
        return self._moved(accesses, self.rates.traffic_bytes_s, kernels=kernels)

    def unpacked(self, weights: int, packed: float, *, fp8: bool = False) -> Cost:
        """Unpacking a matrix, whose weights take `packed` bytes. In fp8 to a byte each, GPTQ's through 16 bits."""
        each = self.job.compute_bytes if not fp8 else 1 if self.job.gptq is None else 5
        moved = packed + each * weights
        return Cost(other_s=moved / self.rates.unpack_bytes_s + self.rates.kernel_s, launches=1)

    def small(self, kernels: float) -> Cost:
        """Kernels that do next to nothing."""
        return Cost(other_s=self.rates.kernel_s * kernels, launches=kernels)

    def _moved(self, elements: float, bytes_s: float, *, kernels: float = 1) -> Cost:
        seconds = self.tokens * elements * self.job.compute_bytes / bytes_s
        return Cost(other_s=seconds + kernels * self.rates.kernel_s, launches=kernels)
