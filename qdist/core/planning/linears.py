"""What do a layer's linears take, forward and backward, with their adapters?"""

from collections.abc import Iterable, Iterator

from qdist.core.model.shapes import LayerShape, Linear
from qdist.core.planning.cost import NOTHING, Cost, Kernels, total
from qdist.core.planning.memory import LayerSizes

INT8_SHARE = 0.55
"""Share of the rate of 16-bit products at the full clock that LLM.int8's forward product reaches, overhead included:
quantizing the input, scaling the result. Chosen, with the next, on the rows of 8 bits in
tests/core/planning/test_speed.py."""
INT8_STOP = 0.8
"""Its wait for the GPU to report outlier columns, as a multiple of the time to launch a linear."""
PEFT_ACCESSES = 5.0
"""16-bit accesses per output of an adapted linear and pass for peft's scaling, adding and casting."""
DROPOUT_ACCESSES = {False: 3.0, True: 0.5}
"""16-bit accesses per input of an adapted linear and pass for dropout: peft's, which copies; and ours, whose hash of
each element takes the time of half an access (an estimate)."""
FUNCTION_LAUNCHES = 3
"""Python's part of an adapted linear beside its kernels: PEFT's module and autograd's function."""


class Linears:
    """The linears of a layer in one micro-batch.

    Those that read one tensor share what they do with it where the job says so: A's are one thin matrix, and their
    input gradients are added up inside the products.
    """

    def __init__(self, kernels: Kernels, shape: LayerShape, own: LayerSizes, stop_s: float) -> None:
        """stop_s: seconds of a stop of int8's."""
        self.kernels, self.job, self.stop_s = kernels, kernels.job, stop_s
        self.shape, self.adapted = shape, set(shape.targeted(kernels.job.targets))
        weights = sum(linear.weights for linear in shape.linears)
        self.packed = (own.packed - own.packed_experts) / max(1, weights)

    def forward(self) -> Cost:
        """Products and adapters of the forward pass."""
        products = total(self._product(linear) for linear in self.shape.linears)
        return products + total(self._adapted_forward(group) for group in self._groups())

    def backward(self) -> Cost:
        """Gradients of inputs, of A and of B."""
        products = total(self._input_gradient(linear) for linear in self.shape.linears)
        return products + total(self._adapted_backward(group) for group in self._groups()) + self._sums()

    def _product(self, linear: Linear) -> Cost:
        product = self._multiplied(linear, linear.inputs)
        if self.job.bits == 8:
            slower = self.kernels.product(linear.inputs, linear.outputs).gpu_s * (1 / INT8_SHARE - 1)
            return product + Cost(other_s=slower + self.stop_s, launches=3)
        return product + (self._unpacked(linear) if self.job.bits == 4 else NOTHING)

    def _input_gradient(self, linear: Linear) -> Cost:
        return self._multiplied(linear, linear.outputs) + (self._unpacked(linear) if self.job.bits < 16 else NOTHING)

    def _multiplied(self, linear: Linear, entering: int) -> Cost:
        """entering: width of what enters the product, which in fp8 is quantized first: 16 bits read, 8 written."""
        product = self.kernels.product(linear.inputs, linear.outputs, fp8=self.job.fp8)
        return product + self.kernels.elementwise(1.5 * entering) if self.job.fp8 else product

    def _unpacked(self, linear: Linear) -> Cost:
        return self.kernels.unpacked(linear.weights, self.packed * linear.weights, fp8=self.job.fp8)

    def _groups(self) -> Iterator[list[Linear]]:
        """The adapted linears that share what they do with the tensor that they read."""
        adapted = [linear for linear in self.shape.linears if linear in self.adapted]
        if not self.job.shared_reads:
            yield from ([linear] for linear in adapted)
            return
        for read in dict.fromkeys((linear.reads, linear.within) for linear in adapted):
            yield [linear for linear in adapted if (linear.reads, linear.within) == read]

    def _adapted_forward(self, group: list[Linear]) -> Cost:
        kernels, rank, pool = self.kernels, self.job.rank_r, self.job.adapter.pool
        inputs, ranks = group[0].inputs, self.job.rank_r * len(group)
        pooled = kernels.elementwise(inputs * (1 + 1 / pool)) if pool > 1 else NOTHING
        narrow = pooled + kernels.thin(inputs / pool, ranks) + self._dropped(group)
        wide = total(kernels.added(linear.outputs, rank) for linear in group)
        python = Cost(launches=FUNCTION_LAUNCHES * len(group))
        return narrow + wide + self._casts(group) + python + self._peft(group)

    def _adapted_backward(self, group: list[Linear]) -> Cost:
        """B reads the outputs' gradient twice; A adds to the inputs' gradient, and its own reads the inputs."""
        kernels, rank, pool = self.kernels, self.job.rank_r, self.job.adapter.pool
        inputs, ranks = group[0].inputs, self.job.rank_r * len(group)
        of_outputs = total(kernels.thin(linear.outputs, rank) * 2 for linear in group)
        of_inputs = kernels.added(inputs, ranks) + kernels.thin(inputs / pool, ranks)
        scaled = kernels.small(2 * len(group))
        accumulated = kernels.small(2 * len(group))
        extra = self._casts(group) + self._dropped(group) + self._peft(group)
        return of_outputs + of_inputs + scaled + accumulated + extra

    def _casts(self, group: list[Linear]) -> Cost:
        """A and B in 16 bits, anew in each pass: small beside what they are multiplied with."""
        return self.kernels.small(2 * len(group)) if self.job.compute_bytes < 4 else NOTHING

    def _dropped(self, group: list[Linear]) -> Cost:
        if not self.job.lora_dropout:
            return NOTHING
        readers = len(group) if not self.job.fused_lora else 1
        return self.kernels.elementwise(DROPOUT_ACCESSES[self.job.fused_lora] * group[0].inputs) * readers

    def _peft(self, group: list[Linear]) -> Cost:
        """What peft's own layers move beside: scaled and added outputs, and inputs cast to fp32 and back."""
        if self.job.fused_lora:
            return NOTHING
        cast = 5 * (self.job.bits == 16)
        accesses = sum(PEFT_ACCESSES * linear.outputs + cast * linear.inputs for linear in group)
        return self.kernels.elementwise(accesses, kernels=3 * len(group))

    def _sums(self) -> Cost:
        """Autograd's sums of the input gradients of all that read one tensor, unless products add them up."""
        if self.job.shared_reads and self.job.fused_lora and set(self.shape.linears) == self.adapted:
            return self.kernels.elementwise(sum(_again(self.shape.linears)), kernels=0)
        repeated = list(_again(self.shape.linears))
        return self.kernels.elementwise(3 * sum(repeated), kernels=len(repeated))


def _again(linears: Iterable[Linear]) -> Iterator[int]:
    """Inputs of each linear that reads a tensor which one before it reads as well."""
    seen = set()
    for linear in linears:
        if linear.reads in seen:
            yield linear.inputs
        seen.add(linear.reads)
