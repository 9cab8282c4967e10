"""How much does autograd keep of one token in one decoder layer? Counted tensor by tensor."""

from typing import Literal

from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import LORA
from qdist.core.model.shapes import Experts, LayerShape, Linear

Recurrence = Literal["torch", "fla"]
"""Which kernel recurrent layers run: torch's own operations, or flash-linear-attention's."""
CHUNK = 64
"""Tokens that Gated DeltaNet's kernels take at a time, torch's and fla's."""
_MAMBA_TENSORS = 12
"""Float32 tensors as wide as its projections that another recurrent layer is taken to keep; nobody has measured it."""
_BACK = 6
"""Float32 gradients as wide as its values alive in the backward pass of a recurrent layer; nobody has measured it."""


def saved_bytes_per_token(
    shape: LayerShape,
    *,
    bits: int,
    compute_bytes: int,
    rank_r: int,
    targets: tuple[str, ...],
    adapter: LoraMethod = LORA,
    seq_len: int,
    fused_layers: bool,
    fused_lora: bool,
    lora_dropout: bool,
    recurrence: Recurrence = "torch",
) -> int:
    """What autograd keeps of one token in one decoder layer: each distinct tensor once.

    A frozen linear keeps nothing of its input, LoRA's A keeps its input and B the rank-wide product.
    fused_lora: our own adapted linears, which keep no casts and draw masks of dropout anew; peft's otherwise.
    tests/core/planning/test_memory.py holds these terms against the tensors that torch saves.
    """
    adapted = shape.targeted(targets)
    fused = fused_layers and shape.norm == "rms"
    casts = compute_bytes < 4 and bits == 16 and not fused_lora
    mixed = {"attention": _saved_by_attention(shape, compute_bytes, seq_len), "none": 0}
    return (
        _saved_by_norms(shape, compute_bytes, fused)
        + (saved_by_recurrence(shape, compute_bytes, recurrence) if shape.mixer == "recurrent" else mixed[shape.mixer])
        + _saved_by_activation(shape, compute_bytes, fused)
        + adapter.saved_inputs(shape, adapted, compute_bytes, casts=casts, dropout=lora_dropout, shared=fused_lora)
        + len(adapted) * rank_r * compute_bytes
        + _saved_by_experts(shape, compute_bytes, rank_r, adapted, shape.targeted_matrices(targets))
    )


def working_bytes_per_token(
    shape: LayerShape,
    *,
    compute_bytes: int,
    targets: tuple[str, ...],
    seq_len: int,
    recurrence: Recurrence,
    fused: bool = False,
) -> int:
    """Bytes per token alive only while the backward pass is in the widest part of a layer.

    MLP: three gradients as wide as it (of the product, the gate and up). fused: Liger writes the latter two over what
    was kept, and beside the first there are the gradients of the layer's output and input. Seven runs of today's dense
    models on an H200 had 0.95 to 1.2 times that.
    """
    mlp = shape.intermediate + 2 * shape.hidden if fused and shape.mlp == "gated" else 3 * shape.intermediate
    return max(
        mlp * compute_bytes,
        _working_of_experts(shape, compute_bytes, adapted=bool(shape.targeted_matrices(targets))),
        _working_of_scores(shape, compute_bytes, seq_len),
        4 * _BACK * _values_of(shape) if shape.mixer == "recurrent" else 0,
    )


def _saved_by_norms(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """Bytes per token saved by norms: the fp32 upcast of the input, or with a fused norm the input itself."""
    width = compute_bytes if fused else 4
    heads = (shape.heads + shape.kv_heads) * shape.head_dim * bool(shape.qk_norm)
    whole = shape.qk_norm == "whole"  # which Liger 0.8 leaves to torch: olmo2-7b keeps 16 KiB more a token and layer
    return width * shape.norms * shape.hidden + (4 if whole else width) * heads


def _saved_by_attention(shape: LayerShape, compute_bytes: int, seq_len: int) -> int:
    """Bytes per token. Flash: q, k, v, output, a log-sum-exp per head. Eager: q, fp32 softmax and its cast, and k and v
    repeated for every query head. With attention sinks the softmax is in the compute dtype, and is its own cast."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    gate = compute_bytes * _saved_by_output_gate(shape, queries, compute_bytes) * shape.output_gate
    if shape.attention == "eager":
        upcast = 4 * (compute_bytes < 4 and not has_sinks(shape))
        scores = shape.heads * seq_len * (compute_bytes + upcast)
        return compute_bytes * 3 * queries + scores + gate
    saved = compute_bytes * (queries + 2 * keys) + gate
    if sum(linear.reads == "attention_in" for linear in shape.linears) == 1:
        saved += compute_bytes * (queries + keys)  # v is a view, and keeps all of the fused projection alive
    return saved + compute_bytes * queries + 4 * shape.heads


def _saved_by_output_gate(shape: LayerShape, queries: int, compute_bytes: int) -> int:
    """Elements per token: the gate's sigmoid; the output that was copied for it; and in fp32, where a norm keeps a view
    of the queries, the gate beside them."""
    view = compute_bytes == 4 and bool(shape.qk_norm)
    return queries * (1 + (shape.attention == "repacked") + view)


def _working_of_scores(shape: LayerShape, compute_bytes: int, seq_len: int) -> int:
    """Bytes per token of the gradients of written-out scores: in fp32 before the softmax and behind it, and its cast.

    With attention sinks all three are in the compute dtype. Without repeated keys (BLOOM) the MLP was the widest part
    in every measurement.
    """
    written = shape.attention == "eager" and shape.mixer == "attention" and shape.kv_heads < shape.heads
    each = 3 * compute_bytes if has_sinks(shape) else 8 + compute_bytes
    return shape.heads * seq_len * each * written


def has_sinks(shape: LayerShape) -> bool:
    """Whether the softmax has a learned term of its own for each head."""
    return any(kept.path.endswith(".sinks") for kept in shape.kept)


def _saved_by_activation(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """Bytes per token. Gated: gate, activation(gate) and up (fused: gate and up). GELU: its input. ReLU: its output.

    `LoraMethod.saved_inputs` counts what the last linear reads; ReLU's output is that very tensor.
    """
    tensors = {"gated": 2 if fused else 3, "gelu": 1, "relu": 0}[shape.mlp]
    return tensors * shape.inner * compute_bytes


def _saved_by_experts(
    shape: LayerShape, compute_bytes: int, rank_r: int, adapted: tuple[Linear, ...], matrices: tuple[Linear, ...]
) -> int:
    """Bytes per token of the routed experts, whose pairs of token and expert are as many whatever the router does.

    Kept of a pair: the first product, with which the backward pass computes the gate anew; beside an adapted matrix the
    rank-wide product. Kept of a token: the router's probabilities in fp32, indices and weights of its experts; the
    layer's input if the first matrix is adapted, unless an adapted linear keeps it already.
    """
    experts = shape.experts
    if experts is None:
        return 0
    first, _ = widths_of(experts)
    reads = any(matrix.reads == "mlp_in" for matrix in matrices)
    own_input = shape.hidden * (reads and not any(linear.reads == "mlp_in" for linear in adapted))
    pairs = experts.active * (first + rank_r * len(matrices))
    routing = 4 * experts.count + experts.active * (8 + 4 + 4)
    return (pairs + own_input) * compute_bytes + routing


def widths_of(experts: Experts) -> tuple[int, int]:
    """Widths of an expert's first product, and of what its last matrix reads."""
    first = sum(matrix.outputs for matrix in experts.matrices if matrix.reads == "mlp_in")
    return first, sum(matrix.inputs for matrix in experts.matrices if matrix.reads == "mlp_out")


def _working_of_experts(shape: LayerShape, compute_bytes: int, *, adapted: bool) -> int:
    """Bytes per token of the backward pass over its pairs while the first product's matrices are unpacked.

    Gradients of the output, the input and the first product; the gate's output and its gradient. Beside adapters also
    the gathered input, and what the last matrix read.
    """
    experts = shape.experts
    if experts is None:
        return 0
    first, last = widths_of(experts)
    return experts.active * ((2 + adapted) * (shape.hidden + last) + first) * compute_bytes


def saved_by_recurrence(shape: LayerShape, compute_bytes: int, recurrence: Recurrence) -> int:
    """Bytes per token of Gated DeltaNet, from transformers' torch code or fla's; of others a rough count.

    Queries and keys are repeated to as many heads as values have, and taken to be as wide.
    """
    values, heads = _values_of(shape), _decays_of(shape)
    projected = sum(linear.outputs for linear in shape.linears if linear.reads == "attention_in")
    if not any(linear.name.startswith("in_proj_qkv") for linear in shape.linears) or not heads:
        return 4 * _MAMBA_TENSORS * max(projected, values, shape.hidden)
    mixed = projected - values  # queries, keys and values enter the convolution together
    norm = (4 * 3 + compute_bytes) * values  # in fp32: input, gate, the gate's SiLU; and the normed input
    outside = norm + 2 * mixed * compute_bytes  # the convolution's input and output
    if recurrence == "fla":
        return outside + compute_bytes * (3 * values + CHUNK * heads) + 4 * 4 * heads
    states = values * (values // heads) // CHUNK
    if compute_bytes == 4:
        return outside + 4 * (15 * values + states + 5 * CHUNK * heads + 9 * heads)
    # Autocast casts what enters each product, and keeps the copies.
    full = 4 * (8 * values + states + 2 * CHUNK * heads + 9 * heads)
    return outside + full + compute_bytes * (9 * values + 2 * states + 3 * CHUNK * heads)


def _values_of(shape: LayerShape) -> int:
    """Width of what the output projection of a mixer reads."""
    return max((linear.inputs for linear in shape.linears if linear.reads == "attention_out"), default=shape.hidden)


def _decays_of(shape: LayerShape) -> int:
    """Heads of Gated DeltaNet: one decay each."""
    return next((kept.parameters for kept in shape.kept if kept.path.rpartition(".")[2] == "A_log"), 0)
