"""How fast does a card run the kernels of a training step, and what is taken for one that nobody measured?"""

from collections.abc import Sequence
from statistics import median

import msgspec

FULL_CLOCK = 1.174
"""Rate of dense products at the full clock over the sustained one, at which a card draws all the power that it may:
790 and 673 TFLOP/s of 8192-wide bf16 matrices on an H200 (700 W)."""
PRODUCT_S = 5e-6
"""Seconds that a dense product takes beyond its arithmetic: 1024 x 4096 x 4096 in 49.4 us on an H200, of which the
arithmetic at 790 TFLOP/s is 43.5."""
GROUPED_SHARE = 0.6
"""Grouped products over 128 experts against dense ones: 8,192 x 8 pairs of a layer of Qwen3-30B-A3B on an H200, 412 and
206 GFLOP in 0.70 and 0.41 ms, of which the smaller has 503 TFLOP/s and the larger 589."""
FP8_SHARE = 1.86
"""fp8 products with a scale a row against bf16 ones: 1,394 to 1,508 TFLOP/s where bf16 has 761 to 789 (H200, 8,192
tokens, matrices of 7B)."""
UNPACK_SHARE = 0.8
"""NF4 to 16 bits in one kernel against copying, in bytes/s: 3.3 to 3.5 TB/s of 4.2 (H200, matrices of 7B, 65B)."""
TRAFFIC_SHARE = 0.95
"""Elementwise kernels against copying, in bytes/s: 3.9 to 4.3 TB/s of 4.18 for additions, gated activations, rotations
and norms in a step of a 7B at 16x512 (H200)."""
THIN_SHARE = 0.85
"""Products with a matrix of 64 columns: 21.7 us for 67 MB of inputs, 54 for 180, a kernel's 3 us among them."""
ADDED_SHARE = 0.68
"""Thin products added to a wide result: 71.6 and 60 us for 199 and 166 MB read and written (the same)."""
KERNEL_S = 2e-6
"""Seconds from one kernel of a CUDA graph to the next, beyond what they do (H200)."""
GRAPH_S = 50e-6
"""Seconds to launch a captured graph: an estimate."""


class AttentionRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Causal attention of 16 bits over rows of one length. FLOP/s count half the scores, twice for two products."""

    head_dim: int
    length: int
    forward_flops_s: float
    backward_flops_s: float
    """Of five products."""


_ATTENTION = tuple(
    AttentionRate(head_dim=head_dim, length=length, forward_flops_s=forward, backward_flops_s=backward)
    for head_dim, length, forward, backward in (
        (64, 512, 0.272, 0.189), (128, 512, 0.434, 0.263), (128, 2048, 0.656, 0.499), (256, 512, 0.380, 0.158),
    )
)  # fmt: skip
"""As shares of dense products at the full clock: cuDNN's on an H200 (torch 2.11), 16x512 and 4x2048 tokens."""


class KernelRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates of kernels at the card's full clock. Bytes count once for each direction in which they move."""

    dense_flops_s: float
    """FLOP/s of dense 16-bit matrix products, large ones."""
    product_s: float
    """Seconds that one takes beyond its arithmetic."""
    grouped_flops_s: float
    """FLOP/s of grouped products over experts."""
    fp8_flops_s: float
    """FLOP/s of dense fp8 products with a scale a row; 0 if the card has none."""
    attention: tuple[AttentionRate, ...]
    unpack_bytes_s: float
    """Bytes/s of unpacking NF4 to 16 bits, both counted."""
    traffic_bytes_s: float
    """Bytes/s of elementwise kernels."""
    thin_bytes_s: float
    """Bytes/s at which a product with a matrix of a rank's width reads its inputs."""
    added_bytes_s: float
    """Bytes/s at which such a product is added to a wide result, read and written."""
    kernel_s: float
    """Seconds from one kernel to the next in a CUDA graph, beyond what they do."""
    graph_s: float
    """Seconds to launch a captured graph."""


def usual_kernel_rates(matmul_flops_s: float, memory_bytes_s: float) -> KernelRates:
    """Those of a card of which only the sustained product rate and the rate of copies are known: an H200's in scale."""
    dense = FULL_CLOCK * matmul_flops_s
    return KernelRates(
        dense_flops_s=dense,
        product_s=PRODUCT_S,
        grouped_flops_s=GROUPED_SHARE * dense,
        fp8_flops_s=FP8_SHARE * dense,
        attention=tuple(
            msgspec.structs.replace(
                own, forward_flops_s=dense * own.forward_flops_s, backward_flops_s=dense * own.backward_flops_s
            )
            for own in _ATTENTION
        ),
        unpack_bytes_s=UNPACK_SHARE * memory_bytes_s,
        traffic_bytes_s=TRAFFIC_SHARE * memory_bytes_s,
        thin_bytes_s=THIN_SHARE * memory_bytes_s,
        added_bytes_s=ADDED_SHARE * memory_bytes_s,
        kernel_s=KERNEL_S,
        graph_s=GRAPH_S,
    )


def slowest_kernels(several: Sequence[KernelRates | None]) -> KernelRates | None:
    """What all cards can be counted on for, figure by figure; None unless all were measured."""
    known = [rates for rates in several if rates is not None]
    if not known or len(known) < len(several):
        return None
    longest = {"product_s", "kernel_s", "graph_s"}
    figures = {
        name: (max if name in longest else min)(getattr(rates, name) for rates in known)
        for name in (field.name for field in msgspec.structs.fields(KernelRates))
        if name != "attention"
    }
    shared = set.intersection(*({(own.head_dim, own.length) for own in rates.attention} for rates in known))
    attention = tuple(_slowest_attention(known, *shape) for shape in sorted(shared))
    return KernelRates(attention=attention, **figures)


def _slowest_attention(several: Sequence[KernelRates], head_dim: int, length: int) -> AttentionRate:
    found = [own for rates in several for own in rates.attention if (own.head_dim, own.length) == (head_dim, length)]
    return AttentionRate(
        head_dim=head_dim,
        length=length,
        forward_flops_s=min(own.forward_flops_s for own in found),
        backward_flops_s=min(own.backward_flops_s for own in found),
    )


def fit_products(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(FLOP/s, seconds beyond the arithmetic) of products of many sizes, from (FLOP, seconds) of each.

    The rate is that of the largest three in the median; the rest of the time the median of what the others took longer.
    """
    largest_first = sorted(measured, reverse=True)
    rate = median(flops / seconds for flops, seconds in largest_first[:3])
    rest = [max(0.0, seconds - flops / rate) for flops, seconds in largest_first[3:]]
    return rate, median(rest) if rest else PRODUCT_S


def attention_seconds(rates: KernelRates, head_dim: int, length: int, flops: float, *, backward: bool) -> float:
    """Seconds of causal attention over rows of a length; flops: of its forward pass, whose backward pass has 2.5.

    The rate of the nearest measured head size. It grows with the length as R L / (L + c) does: blocks on the diagonal
    are computed whole, and each row of blocks has a start and an end. c is taken from two lengths of one head size.
    """

    def inverse(own: AttentionRate) -> float:
        return 1 / (own.backward_flops_s if backward else own.forward_flops_s)

    nearest = min(rates.attention, key=lambda own: (abs(own.head_dim - head_dim), own.length))
    pairs = [
        (short, long)
        for short in rates.attention
        for long in rates.attention
        if short.head_dim == long.head_dim and short.length < long.length
    ]
    work = flops * (2.5 if backward else 1.0)
    if not pairs:
        return work * inverse(nearest)
    short, long = min(pairs, key=lambda pair: abs(pair[0].head_dim - nearest.head_dim))
    slope = (inverse(short) - inverse(long)) / (1 / short.length - 1 / long.length)
    start = max(0.0, slope / max(1e-30, inverse(long) - slope / long.length))
    return work * inverse(nearest) * (1 + start / length) / (1 + start / nearest.length)
