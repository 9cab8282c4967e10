"""How long will a training step take? From shapes and the rates of card and links, with a few measured shares.

A layer's pass is matrix products at a share of the card's rate, attention, the unpacking of its weights, and
elementwise work that moves bytes. Python launches its kernels one by one, which bounds small micro-batches.
"""

from collections.abc import Sequence
from math import ceil

import msgspec

from qdist.core.machine.cluster import FP8_RATIO, Rates
from qdist.core.model.shapes import LayerShape
from qdist.core.planning.activations import CHUNK, has_sinks, saved_by_recurrence, widths_of
from qdist.core.planning.memory import LayerSizes, Sizes, TrainingShape, first_of

GEMM_SHARE = 0.98
"""Share of the sustained matmul rate, for a layer's shapes: chosen on the rows of tests/core/planning/test_speed.py,
which are therefore no proof of it."""
ATTENTION_SHARE = 0.35
"""The same for flash attention, causal, 512 tokens: 13 ms instead of 4.8."""
UNPACK_SHARE = 0.8
"""Share of the memory rate for NF4 to 16 bits in one kernel: 3.3 to 3.5 TB/s of 4.2 (H200, matrices of 7B and 65B)."""
TRAFFIC_SHARE = 0.85
"""Share of the memory rate for elementwise kernels: norms, activations, rotations and additions."""
INT8_SHARE = 0.62
"""Share of the 16-bit matmul rate that LLM.int8's forward product reaches, overhead included: quantizing the input,
scaling the result. Chosen, with the next, on the three rows of 8 bits in tests/core/planning/test_speed.py."""
FP8_SHARE = 0.85
"""Share of the fp8 rate for products with a scale a row, at a layer's shapes: an estimate until bench/fp8.py is run."""
FP8_BYTES = 3
"""Bytes moved to quantize an activation or a gradient: 16 bits read, 8 written."""
GROUPED_SHARE = 0.6
"""Share of the sustained matmul rate for grouped products over experts, whose groups are of many sizes: an estimate."""
RECURRENT_VISITS = {"fla": 2.0, "torch": 4.0}
"""Times that the tensors which a recurrent layer keeps are moved in each pass, by its kernel: an estimate."""
CHUNK_LAUNCHES, RECURRENCE_LAUNCHES = 1.7, 11.0
"""Time to launch torch's operations on one chunk of a recurrence's sequence, and on all chunks together (it inverts 64
rows one after the other), as multiples of that for a linear: qwen3.5-9b on an H200, 8x512 and 2x2048."""
EXPERTS_LAUNCHES, EXPERTS_ADAPTER = 3, 1
"""Time to launch the passes of a parameter of experts, and of its adapter, as multiples of that for a linear."""
PAIR_ACCESSES, GATE_ACCESSES = (9, 18), (9, 25)
"""16-bit accesses, forward and backward, per element of a pair of token and expert that is gathered, weighed and
summed, and per element of its gate, which torch computes; from spikes of a layer of Qwen3-30B-A3B on an H200."""
SINKS_ACCESSES = 30
"""16-bit accesses per written-out score with attention sinks: gpt-oss-20b on an H200."""
INT8_STOP = 0.8
"""Its forward product's wait for the GPU to report outlier columns, as a multiple of the time to launch a linear."""
PEFT_ACCESSES = 5.0
"""16-bit accesses per output of an adapted linear and pass for peft's scaling, adding and casting."""
DROPOUT_ACCESSES = {False: 3.0, True: 0.5}
"""16-bit accesses per input of an adapted linear and pass for dropout: peft's, which copies; and ours, whose hash
of each element takes the time of half an access (an estimate)."""
LAUNCH_SHARE = 1.35
"""Time to launch all of a layer's kernels over that for its linears alone; bounds small micro-batches."""
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
SHARD_COPIES = 4
"""Memory passes over a gathered layer's bytes: into the gather and out of it, each read and written."""
FLOAT32_SLOWDOWN = 15
"""Slowdown of 32-bit matrix products over 16-bit ones: they do not use the matrix units."""


class Passes(msgspec.Struct, frozen=True):
    """Seconds of one micro-batch: each pass through a layer of each run, and the head with its loss."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    """Backward seconds of a layer of each run, without recomputation."""
    head_s: float
    token_bytes: int
    """Bytes of the micro-batch's hidden states, as a stage sends them."""


def passes(sizes: Sizes, rates: Rates, micro_batch: int, *, tokens: int = 0, attended: int = 0) -> Passes:
    """Predict the time of one micro-batch on one GPU that holds all its weights.

    tokens: its positions, padding included; 0 for `micro_batch` whole sequences.
    attended: length of the row or the packed sample that a position attends to; 0 for a whole sequence.
    """
    facts, job = sizes.facts, sizes.job
    tokens = tokens or micro_batch * job.seq_len
    job = msgspec.structs.replace(job, seq_len=attended) if attended else job
    pairs = zip(facts.shapes, sizes.layers, strict=True)
    times = [_layer_passes(shape, own, job, rates, tokens) for shape, own in pairs]
    slow = FLOAT32_SLOWDOWN if job.compute_bytes == 4 else 1
    flops_s = rates.matmul_flops_s * GEMM_SHARE / slow
    traffic_s = rates.memory_bytes_s * TRAFFIC_SHARE
    head = 4 * facts.vocab * facts.hidden * tokens / flops_s + _loss_traffic(sizes, tokens) / traffic_s
    return Passes(
        tuple(forward for forward, _ in times),
        tuple(backward for _, backward in times),
        head,
        tokens * sizes.entering_token,
    )


def _layer_passes(
    shape: LayerShape, own: LayerSizes, job: TrainingShape, rates: Rates, tokens: int
) -> tuple[float, float]:
    """Seconds of a layer, forward and backward."""
    weights = sum(linear.weights for linear in shape.linears)
    slow = FLOAT32_SLOWDOWN if job.compute_bytes == 4 else 1
    flops_s = rates.matmul_flops_s * GEMM_SHARE / slow
    product = _product_s(weights * tokens, weights, job, rates)
    stops = INT8_STOP * rates.linear_s * len(shape.linears)
    quantized = product / INT8_SHARE + stops if job.bits == 8 else product
    scores = 2 * tokens * job.seq_len * shape.heads * shape.head_dim
    attention = scores / (rates.matmul_flops_s * ATTENTION_SHARE / slow)
    own_packed = own.packed - own.packed_experts
    unpacked = own_packed + _unpacked_bytes(job) * weights
    unpack = 0.0 if job.bits == 16 else unpacked / (rates.memory_bytes_s * UNPACK_SHARE)
    forward_bytes, backward_bytes = (tokens * size * job.compute_bytes for size in _accesses(shape, job))
    if job.fp8:
        forward_bytes += FP8_BYTES * tokens * sum(linear.inputs for linear in shape.linears)
        backward_bytes += FP8_BYTES * tokens * sum(linear.outputs for linear in shape.linears)
    adapter = 2 * _visited_adapter(shape, job) * tokens / flops_s
    traffic_s = rates.memory_bytes_s * TRAFFIC_SHARE
    forward = quantized + attention + adapter + unpack * (job.bits == 4) + forward_bytes / traffic_s
    backward = product + 2.5 * attention + 2 * adapter + unpack + backward_bytes / traffic_s
    experts, recurrence = _experts_s(shape, own, job, rates, tokens), _recurrence_s(shape, job, rates, tokens)
    forward, backward = forward + experts + recurrence, backward + experts + 2 * recurrence
    launch = LAUNCH_SHARE * _launched(shape, job, tokens) * rates.linear_s / 2
    return max(forward, launch), max(backward, launch)


def _product_s(products: int, weights: int, job: TrainingShape, rates: Rates) -> float:
    """Seconds of this many multiplications with so many weights, which are read once."""
    if job.fp8:
        fp8_s = (rates.fp8_flops_s or FP8_RATIO * rates.matmul_flops_s) * FP8_SHARE
        return max(2 * products / fp8_s, weights / rates.memory_bytes_s)
    slow = FLOAT32_SLOWDOWN if job.compute_bytes == 4 else 1
    return max(2 * products * slow / (rates.matmul_flops_s * GEMM_SHARE), 2 * weights / rates.memory_bytes_s)


def _unpacked_bytes(job: TrainingShape) -> int:
    """Bytes moved for an unpacked weight: in 16 bits 2, in fp8 1. GPTQ's are in 16 bits first, and read again."""
    if not job.fp8:
        return 2
    return 1 if job.gptq is None else 5


def _launched(shape: LayerShape, job: TrainingShape, tokens: int) -> float:
    """Linears of a layer, and what takes as long to launch: grouped products, or one for each expert with tokens."""
    experts = shape.experts
    by_torch = shape.mixer == "recurrent" and job.recurrence == "torch"
    own = len(shape.linears) + (RECURRENCE_LAUNCHES + CHUNK_LAUNCHES * job.seq_len / CHUNK) * by_torch
    if experts is None:
        return own
    each = EXPERTS_LAUNCHES if job.grouped else min(experts.count, tokens * experts.active)
    return own + len(experts.matrices) * each + EXPERTS_ADAPTER * len(shape.targeted_matrices(job.targets))


def _visited_adapter(shape: LayerShape, job: TrainingShape) -> int:
    """Adapter parameters that a token passes."""
    linears = sum(job.adapter.parameters(linear, job.rank_r) for linear in shape.targeted(job.targets))
    matrices = sum(matrix.inputs + matrix.outputs for matrix in shape.targeted_matrices(job.targets))
    return linears + (shape.experts.active * job.rank_r * matrices if shape.experts else 0)


def _experts_s(shape: LayerShape, own: LayerSizes, job: TrainingShape, rates: Rates, tokens: int) -> float:
    """Seconds of a pass through the routed experts: products of the active ones, all of them unpacked and read."""
    experts = shape.experts
    if experts is None:
        return 0.0
    visited = experts.active * sum(matrix.weights for matrix in experts.matrices)
    slow = FLOAT32_SLOWDOWN if job.compute_bytes == 4 else 1
    product = 2 * visited * tokens / (rates.matmul_flops_s * GROUPED_SHARE / slow)
    packed = job.bits < 16 or job.mxfp4
    unpack = (own.packed_experts + 2 * experts.weights) / (rates.memory_bytes_s * UNPACK_SHARE) if packed else 0.0
    return max(product, 2 * experts.weights / rates.memory_bytes_s) + unpack


def _recurrence_s(shape: LayerShape, job: TrainingShape, rates: Rates, tokens: int) -> float:
    """Seconds of a forward pass through a recurrence, from what it keeps."""
    if shape.mixer != "recurrent":
        return 0.0
    kept = tokens * saved_by_recurrence(shape, job.compute_bytes, job.recurrence)
    return RECURRENT_VISITS[job.recurrence] * kept / (rates.memory_bytes_s * TRAFFIC_SHARE)


def _accesses(shape: LayerShape, job: TrainingShape) -> tuple[float, float]:
    """Elements read and written for one token in one layer, forward and backward, outside of products.

    Fused: a norm reads and writes h, and three h backward; the gated activation moves 3 and 5 times its width; rotation
    reads and writes q and k; two residual additions, and the sum of the gradients of all that read one tensor.
    Unfused norms and rotation: chosen on the two stock rows of the same tests, still 7 to 8 % too fast.
    """
    experts = shape.experts
    hidden, inner = shape.hidden, shape.inner
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    fused = job.fused_layers and shape.norm == "rms"
    norm, norm_back = (2, 3) if fused else (16, 32)
    gate, gate_back = {"gated": (3, 5) if fused else (5, 8), "gelu": (2, 3), "relu": (2, 3)}[shape.mlp]
    turn = 2 if fused else 12
    forward: float = shape.norms * norm * hidden + gate * inner + turn * rotated + 6 * hidden
    readers = len(shape.linears) - len({linear.reads for linear in shape.linears})
    backward: float = shape.norms * norm_back * hidden + gate_back * inner + turn * rotated + (6 + 3 * readers) * hidden
    if shape.attention == "eager":
        visits = SINKS_ACCESSES if has_sinks(shape) else 12
        forward, backward = forward + visits * shape.heads * job.seq_len, backward + visits * shape.heads * job.seq_len
    if experts:
        pairs, gates = experts.active * hidden, experts.active * widths_of(experts)[1]
        forward += PAIR_ACCESSES[0] * pairs + GATE_ACCESSES[0] * gates
        backward += PAIR_ACCESSES[1] * pairs + GATE_ACCESSES[1] * gates
    adapted = shape.targeted(job.targets)
    inputs, outputs = sum(linear.inputs for linear in adapted), sum(linear.outputs for linear in adapted)
    # Thin products move bytes: A reads the input, B adds to the output; backward the input's gradient is read and
    # written, and A's gradient may read the input once more.
    backward_inputs = (2 + job.adapter.gradient_reads) * inputs
    forward, backward = forward + inputs + 2 * outputs, backward + backward_inputs + 2 * outputs
    if not job.fused_lora:
        forward, backward = forward + PEFT_ACCESSES * outputs, backward + PEFT_ACCESSES * outputs
        if job.bits == 16:
            forward, backward = forward + 5 * inputs, backward + 5 * inputs  # casts to fp32 and back
    drawn = DROPOUT_ACCESSES[job.fused_lora] * inputs * job.lora_dropout
    return forward + drawn, backward + drawn


def _loss_traffic(sizes: Sizes, tokens: int) -> float:
    """Bytes of logits moved: written, read for the maximum and the sum, turned into their gradient, read again."""
    return tokens * sizes.facts.vocab * (12 if sizes.job.fused_loss else 40)


def _adapter_step_s(
    sizes: Sizes, rates: Rates, *, layers: Sequence[int], stage: int, ranks: int, micro_batches: float, paged: bool
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
    paged: bool = False
    paged_out_bytes: int = 0
    """Bytes of the fullest GPU's moments that do not fit there and cross the bus twice per step."""


def step_seconds(sizes: Sizes, rates: Rates, one: Passes, step: Step) -> float:
    """Seconds of a whole optimizer step."""
    layers = tuple(map(sum, zip(*step.counts, strict=True)))
    end = max(
        _adapter_step_s(
            sizes, rates, layers=own, stage=step.zero_stage, ranks=step.ranks, micro_batches=step.micro_batches,
            paged=step.paged,
        )
        for own in (step.counts if step.pipelined else (layers,))
    ) + 2 * step.paged_out_bytes / rates.host_bytes_s  # fmt: skip
    forward, backward = _gathering(sizes, rates, one, step.shards)
    recomputed = first_of(layers, step.checkpointed)
    shares = [anew / count if count else 0.0 for anew, count in zip(recomputed, layers, strict=True)]
    if step.pipelined:
        slots = step.micro_batches + len(step.counts) - 1
        each = [there * (1 + anew) + back for there, back, anew in zip(forward, backward, shares, strict=True)]
        times = [sum(count * own for count, own in zip(counts, each, strict=True)) for counts in step.counts]
        times[-1] += one.head_s
        return slots * (max(times) + 2 * one.token_bytes / rates.link_bytes_s) + end
    copied = sizes.packed(step.offloaded) / rates.host_bytes_s
    there = sum(count * own for count, own in zip(layers, forward, strict=True))
    back = sum(
        count * (own + anew * again) for count, own, anew, again in zip(layers, backward, shares, forward, strict=True)
    )
    visits = (1 + step.checkpointed / sum(layers)) if any(step.offloaded) else 1
    back = max(back, copied * visits)
    return step.micro_batches * (max(there, copied) + back + one.head_s) + end


def _gathering(sizes: Sizes, rates: Rates, one: Passes, shards: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each pass through a layer of each run if its weights are gathered for it."""
    if shards == 1:
        return one.forward_s, one.backward_s
    gathers = [own.packed * (shards - 1) / shards / rates.link_bytes_s for own in sizes.layers]
    copies = [SHARD_COPIES * own.packed / rates.memory_bytes_s for own in sizes.layers]

    def slower(times: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(max(own, gather) + copy for own, gather, copy in zip(times, gathers, copies, strict=True))

    return slower(one.forward_s), slower(one.backward_s)
