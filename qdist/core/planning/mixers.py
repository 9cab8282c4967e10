"""What does a layer's mixer of tokens take: attention or a recurrence, beside its linears?"""

from qdist.core.machine.kernel_rates import attention_seconds
from qdist.core.model.shapes import LayerShape
from qdist.core.planning.activations import CHUNK, has_sinks, saved_by_recurrence
from qdist.core.planning.cost import NOTHING, Cost, Kernels

PACKED_SLOWDOWN = 1.75
"""Attention within the boundaries of samples (torch's `varlen_attn`, flash) over that of whole rows (cuDNN): 1.70 to
1.79 at head sizes of 64 to 256, 512 and 2,048 tokens, both passes, on an H200."""
SCORES_ACCESSES, SINKS_ACCESSES = 15, 30
"""16-bit accesses per written-out score and pass; with attention sinks: gpt-oss-20b on an H200."""
SCORES_KERNELS = 8
"""Kernels of attention that writes its scores out: two products, mask, scale, softmax, casts."""
RECURRENT_VISITS = {"fla": 2.0, "torch": 4.0}
"""Times that the tensors which a recurrent layer keeps are moved in each pass, by its kernel: an estimate."""
CHUNK_KERNELS, RECURRENCE_KERNELS = 23, 150
"""Kernels and Python's work for each chunk of a recurrence's sequence on torch's operations, and for all chunks
together (it inverts 64 rows one after the other): qwen3.5-9b on an H200, 8x512 and 2x2048."""
FLA_KERNELS = 12
"""Kernels of flash-linear-attention's for a pass: convolution, decays, chunks, norm."""


def mixed(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Forward and backward of what mixes tokens."""
    if shape.mixer == "recurrent":
        return _recurrence(shape, kernels)
    if shape.mixer == "none" or not shape.heads:
        return NOTHING, NOTHING
    return _written_out(shape, kernels) if shape.attention == "eager" else _attention(shape, kernels)


def scores_flops(shape: LayerShape, kernels: Kernels) -> float:
    """FLOP of causal attention, forward: half the scores, and their products with keys and with values."""
    return 2 * kernels.tokens * kernels.job.seq_len * shape.heads * shape.head_dim


def _attention(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Flash attention: one kernel forward, three backward."""
    slower = kernels.slow * (PACKED_SLOWDOWN if kernels.packed else 1)
    flops, length = scores_flops(shape, kernels) * slower, kernels.job.seq_len
    there, back = (
        attention_seconds(kernels.rates, shape.head_dim, length, flops, backward=backward) for backward in (False, True)
    )
    return Cost(other_s=there, launches=1) + kernels.small(1), Cost(other_s=back) + kernels.small(3)


def _written_out(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Scores of all pairs, none left out: their products, and passes over them."""
    job, width = kernels.job, shape.heads * shape.head_dim
    arithmetic = 4 * kernels.tokens * job.seq_len * width * kernels.slow / kernels.rates.dense_flops_s
    visits = SINKS_ACCESSES if has_sinks(shape) else SCORES_ACCESSES
    moved = kernels.elementwise(visits * shape.heads * job.seq_len, kernels=SCORES_KERNELS)
    return moved + Cost(dense_s=arithmetic), moved + Cost(dense_s=2 * arithmetic)


def _recurrence(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """From what a recurrence keeps; on torch's operations its many kernels take longer than what they move."""
    job = kernels.job
    kept = saved_by_recurrence(shape, job.compute_bytes, job.recurrence) / job.compute_bytes
    launched: float = FLA_KERNELS
    if job.recurrence == "torch":
        launched = RECURRENCE_KERNELS + CHUNK_KERNELS * job.seq_len / CHUNK
    there = kernels.elementwise(RECURRENT_VISITS[job.recurrence] * kept, kernels=0)
    many = kernels.small(launched)
    return there + many, there * 2 + many
