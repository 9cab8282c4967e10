"""What do a layer's routed experts take, with their adapters, beside its linears?"""

import msgspec

from qdist.core.model.shapes import Experts, LayerShape, Linear
from qdist.core.planning.activations import widths_of
from qdist.core.planning.cost import NOTHING, Cost, Kernels, total
from qdist.core.planning.memory import LayerSizes

PAIR_ACCESSES, GATE_ACCESSES = (9, 18), (9, 25)
"""16-bit accesses, forward and backward, per element of a pair of token and expert that is gathered, weighed and
summed, and per element of its gate, which torch computes; from spikes of a layer of Qwen3-30B-A3B on an H200."""
ROUTING_KERNELS, PAIR_KERNELS, GATE_KERNELS = (14, 8), (6, 8), (4, 8)
"""Kernels of the router (product, softmax, top k, sort, ends), over pairs, and of the gate, forward and backward."""
MATRIX_LAUNCHES, ADAPTER_LAUNCHES = 28, 12
"""Python's time for a matrix of experts, and for its adapter, a pass: Qwen3-30B-A3B on an H200, 3x1024."""
LOOP_KERNELS = 3
"""Kernels for each expert where products are not grouped: its rows, its matrix and their product."""


def routed(shape: LayerShape, own: LayerSizes, kernels: Kernels) -> tuple[Cost, Cost]:
    """Forward and backward of the routed experts; all of them are unpacked, and those that are visited are read."""
    experts = shape.experts
    if experts is None:
        return NOTHING, NOTHING
    products = _products(experts, own, kernels)
    adapters = [_adapted(matrix, experts, kernels) for matrix in shape.targeted_matrices(kernels.job.targets)]
    passes = []
    for back in (0, 1):
        pairs = kernels.elementwise(PAIR_ACCESSES[back] * experts.active * shape.hidden, kernels=PAIR_KERNELS[back])
        width = experts.active * widths_of(experts)[1]
        gates = kernels.elementwise(GATE_ACCESSES[back] * width, kernels=GATE_KERNELS[back])
        routing = kernels.small(ROUTING_KERNELS[back])
        passes.append(products + pairs + gates + routing + total(each[back] for each in adapters))
    python = MATRIX_LAUNCHES * len(experts.matrices) + ADAPTER_LAUNCHES * len(adapters)
    if not kernels.job.grouped:
        python += LOOP_KERNELS * len(experts.matrices) * min(experts.count, kernels.tokens * experts.active)
    there, back_again = (msgspec.structs.replace(each, launches=python) for each in passes)
    return there, back_again


def visited_experts(experts: Experts, tokens: int) -> float:
    """How many different experts so many tokens visit, if the router spreads them evenly."""
    return experts.count * (1 - (1 - experts.active / experts.count) ** tokens)


def _products(experts: Experts, own: LayerSizes, kernels: Kernels) -> Cost:
    """A pass's products, with all matrices unpacked."""
    job, pairs = kernels.job, kernels.tokens * experts.active
    cost = NOTHING
    for matrix in experts.matrices:
        cost += kernels.grouped(matrix.weights, pairs, visited_experts(experts, kernels.tokens))
        if job.bits < 16 or job.mxfp4:
            packed = own.packed_experts * matrix.weights * experts.count / experts.weights
            cost += kernels.unpacked(matrix.weights * experts.count, packed)
        if not job.grouped:
            cost += kernels.small(LOOP_KERNELS * min(experts.count, pairs))
    return cost


def _adapted(matrix: Linear, experts: Experts, kernels: Kernels) -> tuple[Cost, Cost]:
    """An adapter of each expert's matrix: thin products over pairs, with a matrix of all experts at a time."""
    rank, active = kernels.job.rank_r, experts.active
    there = kernels.thin(active * matrix.inputs, active * rank) + kernels.added(active * matrix.outputs, active * rank)
    of_outputs = kernels.thin(active * matrix.outputs, active * rank) * 2
    back = of_outputs + kernels.added(active * matrix.inputs, active * rank)
    back += kernels.thin(active * matrix.inputs, active * rank)
    return there + kernels.small(4), back + kernels.small(8)
