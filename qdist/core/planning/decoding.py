"""How long does a token take where a model answers by rows of one cache, and how long a prompt?

A step brings each row one token on. It is a list of kernels, each with the bytes that it reads and a fixed time; where
a CUDA graph holds them, nothing waits for Python.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import msgspec

from qdist.core.machine.cluster import Rates
from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.core.model.storage import BLOCK
from qdist.core.planning.activations import has_sinks
from qdist.core.planning.cost import LINEAR_LAUNCHES, NOTHING, Cost, Kernels, clock, total
from qdist.core.planning.elementwise import TRITON_LAUNCHES, others
from qdist.core.planning.expert_products import routed
from qdist.core.planning.inference import cache_bytes
from qdist.core.planning.linears import INT8_STOP, Linears
from qdist.core.planning.memory import LayerSizes, Sizes, TrainingShape
from qdist.core.planning.speed import passes


class FewTokens(NamedTuple):
    """How fast one launch multiplies a few tokens with packed linears that read one tensor (`small_product.py`)."""

    tokens: int
    """As many, or fewer; what is not one token is padded to 16, 32 or 64."""
    share: float
    """Share of the memory's rate at which packed weights are read."""
    start_s: float
    """Seconds of a launch beside that."""
    adapter_share: float
    """The same for an adapter's matrices."""
    adapter_s: float


FEW_TOKENS = (
    FewTokens(1, 0.404, 5.2e-6, 0.53, 3.4e-6),
    FewTokens(16, 0.227, 4.5e-6, 0.39, 3.5e-6),
    FewTokens(32, 0.205, 6.0e-6, 0.40, 5.1e-6),
    FewTokens(64, 0.170, 10.7e-6, 0.22, 6.5e-6),
)
"""Lines through what q,k,v; o; gate,up and down of a 7B took on an H200 (torch 2.11, Triton 3.6; 4,177 GB/s), in NF4
and in GPTQ together, without and with r=64: bench/decode_kernels.py, 2026-11-30. Equal from 2 to 16 tokens."""
MOST_MEMBERS = 3
"""Linears of one launch."""
CACHE_SHARE = 0.7
"""Share of the memory's rate at which keys and values are read: an estimate, with which a step of 32 rows of a 7B at
84 tokens takes 6.8 ms, as it does on an H200."""
CACHE_KERNELS = 3
"""Kernels of attention in a step: writing a key and a value, attending in parts, joining them. 6.1 us a layer of a 7B
at one row on an H200."""
STEP_KERNELS = 30
"""Kernels of a step outside of layers, beside the head: places, masks, rotations, the last norm and the choice; counted
in `Decoder._pass` and `Chooser`."""
RECURRENT_KERNELS = 20
"""Kernels of a recurrent layer for one token: an estimate."""


def why_one_by_one(facts: ModelFacts) -> str:
    """Why each answer has a pass of its own for every token, as a phrase; empty if they are rows of one cache."""
    if any(shape.mixer != "attention" for shape in facts.shapes):
        return "it has layers that keep something else than keys and values"
    if any(shape.attention == "eager" and not has_sinks(shape) for shape in facts.shapes):
        return "its attention adds a bias to scores"
    return ""


def why_launched(facts: ModelFacts, job: TrainingShape) -> str:
    """Why a step on one GPU is not a CUDA graph, as a phrase; empty if it is."""
    if job.bits == 8 and job.gptq is None:
        return "products in int8 wait for the GPU to report outliers"
    if any(shape.experts for shape in facts.shapes) and not job.grouped:
        return "experts are taken in turn, as the router has it"
    return why_one_by_one(facts)


def step_seconds(parts: Sizes, rates: Rates, rows: int, *, filled: float, captured: bool) -> float:
    """Seconds of a step, in which each of so many rows gets a token.

    filled: tokens of a row in the cache, in the mean. captured: whether the step is a CUDA graph.
    """
    facts = parts.facts
    if rows > 1 and why_one_by_one(facts):
        return rows * step_seconds(parts, rates, 1, filled=filled, captured=False)
    kernels = Kernels(rates, msgspec.structs.replace(parts.job, seq_len=1), rows)
    layers = total(
        _layer(run.shape, own, kernels, filled, rates) * run.count
        for run, own in zip(facts.layers, parts.layers, strict=True)
    )
    every = layers + _outside(facts, kernels)
    return _seconds(every, rates, captured=captured)


def prompt_seconds(parts: Sizes, rates: Rates, tokens: int) -> float:
    """Seconds until the first token of an answer to a prompt of so many tokens, which no graph holds."""
    every = passes(parts, rates, 1, tokens=tokens, attended=tokens)
    layers = sum(run.count * seconds for run, seconds in zip(parts.facts.layers, every.forward_s, strict=True))
    one = Kernels(rates, parts.job, 1)
    return layers + _seconds(_outside(parts.facts, one), rates, captured=False)


def _seconds(cost: Cost, rates: Rates, *, captured: bool) -> float:
    gpu_s = cost.gpu_s / clock(cost, rates)
    if captured:
        return gpu_s + rates.of_kernels.graph_s
    return max(gpu_s, cost.launches * rates.linear_s / LINEAR_LAUNCHES)


def _layer(shape: LayerShape, own: LayerSizes, kernels: Kernels, filled: float, rates: Rates) -> Cost:
    linears = Linears(kernels, shape, own, stop_s=INT8_STOP * rates.linear_s)
    few = few_tokens(kernels.job, kernels.tokens)
    groups = list(_readers(shape))
    if few is None or not all(map(_has_kernel, groups)):
        products = linears.forward()
    else:
        products = total(_launched(few, group, linears, kernels) for group in groups)
    return products + _mixed(shape, kernels, filled) + others(shape, kernels)[0] + routed(shape, own, kernels)[0]


def few_tokens(job: TrainingShape, tokens: int) -> FewTokens | None:
    """How fast packed linears multiply so many tokens without being unpacked first; None if they are."""
    width = job.bits if job.gptq is None else job.gptq.shape.bits
    scattered = job.gptq is not None and (job.gptq.desc_act or job.gptq.offset is not None)
    if width != 4 or scattered or job.compute_bytes != 2:
        return None
    return next((few for few in FEW_TOKENS if tokens <= few.tokens), None)


def _readers(shape: LayerShape) -> Iterator[list[Linear]]:
    """Linears that read one tensor."""

    def key(linear: Linear) -> tuple[str, str]:
        return linear.reads, linear.within

    for _, members in groupby(sorted(shape.linears, key=key), key):
        yield list(members)


def _has_kernel(group: list[Linear]) -> bool:
    return len(group) <= MOST_MEMBERS and all(linear.inputs % BLOCK == 0 for linear in group)


def _launched(few: FewTokens, group: list[Linear], linears: Linears, kernels: Kernels) -> Cost:
    """One launch for linears that read one tensor, and one before it for their A."""
    packed = linears.packed * sum(linear.weights for linear in group)
    product = Cost(other_s=few.start_s + packed / (few.share * kernels.memory_bytes_s), launches=TRITON_LAUNCHES)
    matrices = adapter_bytes([linear for linear in group if linear in linears.adapted], kernels.job)
    if not matrices:
        return product
    adapter_s = few.adapter_s + matrices / (few.adapter_share * kernels.memory_bytes_s)
    return product + Cost(other_s=adapter_s, launches=TRITON_LAUNCHES)


def adapter_bytes(linears: list[Linear], job: TrainingShape) -> int:
    """Bytes of the matrices that answer beside these linears: A is as wide as the inputs, whatever it pools."""
    return sum(job.rank_r * (linear.inputs + linear.outputs) for linear in linears) * job.compute_bytes


def _mixed(shape: LayerShape, kernels: Kernels, filled: float) -> Cost:
    if shape.mixer == "none" or not shape.heads:
        return kernels.small(RECURRENT_KERNELS) if shape.mixer == "recurrent" else NOTHING
    read = kernels.tokens * cache_bytes(shape, kernels.job.compute_bytes, 1) * filled
    seconds = read / (CACHE_SHARE * kernels.memory_bytes_s)
    return Cost(other_s=seconds) + kernels.small(CACHE_KERNELS) + Cost(launches=CACHE_KERNELS * (TRITON_LAUNCHES - 1))


def _outside(facts: ModelFacts, kernels: Kernels) -> Cost:
    """The head, and what surrounds the layers."""
    return kernels.product(facts.hidden, facts.vocab) + kernels.small(STEP_KERNELS)
