"""How long will a training step take? From shapes and the rates of card and links.

A pass through a layer is a list of kernels (linears.py, mixers.py, expert_products.py, elementwise.py), each with its
work and a fixed cost. Where no CUDA graph holds them, Python launches them one by one, which bounds small
micro-batches.
"""

from collections.abc import Sequence
from math import ceil

import msgspec

from qdist.core.machine.cluster import Network, Rates
from qdist.core.model.shapes import LayerShape
from qdist.core.planning.cost import LINEAR_LAUNCHES, Cost, Kernels, clock, total
from qdist.core.planning.elementwise import others
from qdist.core.planning.expert_products import routed
from qdist.core.planning.linears import INT8_STOP, Linears
from qdist.core.planning.loss import loss_rows
from qdist.core.planning.memory import LayerSizes, Sizes, first_of
from qdist.core.planning.mixers import mixed

AUTOGRAD_SHARE = 0.5
"""Time to launch a kernel of the backward pass that autograd runs without Python, over that of one that Python does."""
CHECKPOINT_LAUNCHES = 90
"""Python's time to have a layer recomputed, beside its kernels: hooks of every saved tensor, and the state of
generators, kept and brought back. 7B at 2x512 on an H200: 440 ms where 211 take no checkpointing, 4.1 ms a layer more
than its forward pass (some 118 launches); OLMo 2 and Granite at 2x2048 2.3 to 3.6 (60 to 90)."""
MICRO_BATCH_LAUNCHES, LOSS_LAUNCHES = 40, 12
"""Python's time outside of layers for a micro-batch, and for a chunk of the fused loss."""
STEP_LAUNCHES, MATRIX_LAUNCHES = 60, 0.15
"""Python's time for an optimizer step and the loop around it while the GPU waits, and for each adapter matrix in it: an
estimate."""
PAGED_SHARE = 0.09
"""Share of the memory rate for AdamW on paged moments that are on the GPU. 65B on an H200: 78 ms more per step."""
OPTIMIZER_ACCESS_BYTES = 40
"""Bytes per trained parameter and step: gradient read for norm, scaled, read; parameter and moments read, written."""
EIGHT_BIT_ACCESS_BYTES, EIGHT_BIT_MATRIX_S = 28, 25e-6
"""The same for AdamW in 8 bits, and seconds to launch its update of one adapter matrix: an estimate."""
ZERO_MATRIX_S = 58e-6
"""Seconds at the end of a DeepSpeed step per adapter matrix: norms, flat copies. 7B without checkpointing on 2 H200s
under ZeRO-2: 28 ms a step more than on one, of which communication is 2.5; 448 matrices."""
ZERO3_MATRIX_S = 0.3e-3
"""Seconds of ZeRO-3 bookkeeping per adapter matrix. 7B on 2 H200s: 139 ms more per step than ZeRO-2, 448 matrices."""
CPU_ADAM_PARAMETERS_S = 256e6
"""Parameters/s that a rank's CPU updates, transfers included. 7B on 2 H200s: 313 ms per step for 80 M."""
GATHER_ACCESSES = 3.5
"""Memory passes over a gathered layer's bytes that take as long as the gather slows what is computed beside it. A layer
of 65B on two H200s, 4x512: products take 0.75 ms more beside its two gathers of 0.4 GB."""


class Passes(msgspec.Struct, frozen=True):
    """Seconds of one micro-batch: each pass through a layer of each run, and the head with its loss."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    """Backward seconds of a layer of each run, without recomputation."""
    recomputed_s: tuple[float, ...]
    """Seconds that recomputing a layer of each run adds to its backward pass."""
    head_s: float
    """Seconds of all that is outside of layers."""
    token_bytes: int
    """Bytes of the micro-batch's hidden states, as a stage sends them."""


def passes(
    sizes: Sizes,
    rates: Rates,
    micro_batch: int,
    *,
    tokens: int = 0,
    attended: int = 0,
    packed: bool = False,
    graphs: bool = False,
) -> Passes:
    """Predict the time of one micro-batch on one GPU that holds all its weights.

    tokens: its positions, padding included; 0 for `micro_batch` whole sequences.
    attended: length of the row or the packed sample that a position attends to; 0 for a whole sequence.
    packed: whether a row holds several samples.
    graphs: whether both passes are one CUDA graph, in which nothing waits for Python.
    """
    facts, job = sizes.facts, sizes.job
    tokens = tokens or micro_batch * job.seq_len
    job = msgspec.structs.replace(job, seq_len=attended) if attended else job
    kernels = Kernels(rates, job, tokens, packed=packed)
    pairs = zip(facts.shapes, sizes.layers, strict=True)
    layers = [_layer(shape, own, kernels, rates) for shape, own in pairs]
    head = _head(sizes, kernels)
    counts = (run.count for run in facts.layers)
    every = total((there + back) * count for (there, back), count in zip(layers, counts, strict=True))
    share = clock(every + head, rates)

    def seconds(cost: Cost) -> float:
        launched = cost.launches * rates.linear_s / LINEAR_LAUNCHES
        return cost.gpu_s / share if graphs else max(cost.gpu_s / share, launched)

    hooks = Cost(launches=CHECKPOINT_LAUNCHES)
    return Passes(
        tuple(seconds(there) for there, _ in layers),
        tuple(seconds(back) for _, back in layers),
        tuple(seconds(there + back + hooks) - seconds(back) for there, back in layers),
        seconds(head) + kernels.rates.graph_s * graphs,
        tokens * sizes.entering_token,
    )


def _layer(shape: LayerShape, own: LayerSizes, kernels: Kernels, rates: Rates) -> tuple[Cost, Cost]:
    """A layer's kernels, forward and backward."""
    linears = Linears(kernels, shape, own, stop_s=INT8_STOP * rates.linear_s)
    rest, (experts, experts_back) = (mixed(shape, kernels), others(shape, kernels)), routed(shape, own, kernels)
    back = total(back for _, back in rest)
    fewer = Cost(launches=-back.launches * (1 - AUTOGRAD_SHARE))
    return linears.forward() + experts + total(there for there, _ in rest), (
        linears.backward() + experts_back + back + fewer
    )


def _head(sizes: Sizes, kernels: Kernels) -> Cost:
    """Output head and loss, both passes. Each chunk of a fused loss reads the whole head twice."""
    facts, fused = sizes.facts, sizes.job.fused_loss
    rows = loss_rows(kernels.tokens, facts.vocab, facts.hidden) if fused else kernels.tokens
    chunks = ceil(kernels.tokens / rows)
    products = kernels.product(facts.hidden, facts.vocab, tokens=rows) * (2 * chunks)
    # Logits are written, read for the maximum and the sum, turned into their gradient, and read again.
    moved = kernels.elementwise((12 if fused else 40) * facts.vocab / sizes.job.compute_bytes, kernels=3 * chunks)
    around = kernels.elementwise(8 * facts.hidden, kernels=4)
    python = Cost(launches=MICRO_BATCH_LAUNCHES + LOSS_LAUNCHES * chunks)
    return products + moved + around + python


def _adapter_step_s(
    sizes: Sizes,
    rates: Rates,
    *,
    layers: Sequence[int],
    stage: int,
    ranks: int,
    micro_batches: float,
    paged: bool,
    graphs: bool,
) -> float:
    """Seconds of the optimizer step and ZeRO's exchanges, for the adapter on these counts of layers by run."""
    trained, job = sizes.trained(layers), sizes.job
    matrices = 2 * sum(
        count * (len(shape.targeted(job.targets)) + len(shape.targeted_matrices(job.targets)))
        for count, shape in zip(layers, sizes.facts.shapes, strict=True)
    )
    own = ceil(trained / ranks) if stage else trained
    if job.eight_bit:
        seconds = max(EIGHT_BIT_MATRIX_S * matrices, own * EIGHT_BIT_ACCESS_BYTES / rates.memory_bytes_s)
    elif job.optimizer_on_gpu:
        seconds = own * OPTIMIZER_ACCESS_BYTES / (rates.memory_bytes_s * (PAGED_SHARE if paged else 1))
    else:
        seconds = own / CPU_ADAM_PARAMETERS_S
    launches = STEP_LAUNCHES + (0 if graphs else MATRIX_LAUNCHES * matrices)
    seconds += launches * rates.linear_s / LINEAR_LAUNCHES
    if stage:
        seconds += ZERO_MATRIX_S * matrices
    if stage == 3:
        seconds += ZERO3_MATRIX_S * matrices
    if ranks > 1:
        exchanges = (micro_batches if stage >= 2 else 1) + 1
        seconds += exchanges * 4 * trained * (ranks - 1) / ranks / rates.link_bytes_s
    return seconds


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs of `step_seconds` from a candidate. Layers are counted by run, as in `memory.Share`."""

    counts: tuple[tuple[int, ...], ...]
    """Layers by run on each GPU of a group; one entry if all GPUs hold the same layers."""
    checkpointed: int
    micro_batches: float
    """Micro-batches of a rank, in the mean over steps."""
    zero_stage: int
    ranks: int
    shards: int = 1
    pipelined: bool = False
    """Whether each GPU is a pipeline stage, all computing at once."""
    offloaded: tuple[int, ...] = ()
    graphs: bool = False
    """Whether a micro-batch's passes are one CUDA graph, for which gradients lie in one buffer."""
    network: Network | None = None
    """Between the GPUs of a group that spans nodes; None if links within a machine are."""
    paged: bool = False
    paged_out_bytes: int = 0
    """Bytes of the fullest GPU's moments that do not fit there and cross the bus twice per step."""


def step_seconds(sizes: Sizes, rates: Rates, one: Passes, step: Step) -> float:
    """Seconds of a whole optimizer step."""
    layers = tuple(map(sum, zip(*step.counts, strict=True)))
    end = max(
        _adapter_step_s(
            sizes, rates, layers=own, stage=step.zero_stage, ranks=step.ranks, micro_batches=step.micro_batches,
            paged=step.paged, graphs=step.graphs,
        )
        for own in (step.counts if step.pipelined else (layers,))
    ) + 2 * step.paged_out_bytes / rates.host_bytes_s  # fmt: skip
    gathered = _gathering(sizes, rates, one, step)
    recomputed = first_of(layers, step.checkpointed)
    shares = [anew / count if count else 0.0 for anew, count in zip(recomputed, layers, strict=True)]
    if step.pipelined:
        slots = step.micro_batches + len(step.counts) - 1
        each = [there + back + anew * again for (there, back, again), anew in zip(gathered, shares, strict=True)]
        times = [sum(count * own for count, own in zip(counts, each, strict=True)) for counts in step.counts]
        times[-1] += one.head_s
        return slots * (max(times) + 2 * _sending_s(one.token_bytes, rates, step.network)) + end
    copied = sizes.packed(step.offloaded) / rates.host_bytes_s
    there = sum(count * own for count, (own, _, _) in zip(layers, gathered, strict=True))
    back = sum(
        count * (own + anew * again) for count, (_, own, again), anew in zip(layers, gathered, shares, strict=True)
    )
    visits = (1 + step.checkpointed / sum(layers)) if any(step.offloaded) else 1
    back = max(back, copied * visits)
    return step.micro_batches * (max(there, copied) + back + one.head_s) + end


def _sending_s(count: float, rates: Rates, network: Network | None, *, hops: int = 1) -> float:
    """Seconds for so many bytes from each GPU to the next, over the slowest link between them."""
    if network is None:
        return count / rates.link_bytes_s
    return count / min(rates.link_bytes_s, network.bytes_s) + hops * network.latency_s


def _gathering(sizes: Sizes, rates: Rates, one: Passes, step: Step) -> list[tuple[float, float, float]]:
    """Seconds of each pass through a layer of each run, forward, backward and anew, if weights are gathered for it."""
    shards = step.shards
    times = list(zip(one.forward_s, one.backward_s, one.recomputed_s, strict=True))
    if shards == 1:
        return times
    gathers = [
        _sending_s(own.packed * (shards - 1) / shards, rates, step.network, hops=shards - 1) for own in sizes.layers
    ]
    slower = [GATHER_ACCESSES * own.packed / rates.memory_bytes_s for own in sizes.layers]
    return [
        (max(there, gather) + more, max(back, gather) + more, again)  # gathered for the backward pass, and recomputed
        for (there, back, again), gather, more in zip(times, gathers, slower, strict=True)
    ]
