"""How much does autograd keep of one token in one decoder layer? Counted tensor by tensor."""

from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import LORA
from qdist.core.model.shapes import LayerShape


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
) -> int:
    """What autograd keeps of one token in one decoder layer: each distinct tensor once.

    A frozen linear keeps nothing of its input, LoRA's A keeps its input and B the rank-wide product.
    fused_lora: our own adapted linears, which cast nothing; peft's otherwise.
    tests/core/planning/test_memory.py holds these terms against the tensors that torch saves.
    """
    adapted = shape.targeted(targets)
    fused = fused_layers and shape.norm == "rms"
    casts = compute_bytes < 4 and bits == 16 and not fused_lora
    return (
        _saved_by_norms(shape, compute_bytes, fused)
        + _saved_by_attention(shape, compute_bytes, seq_len)
        + _saved_by_activation(shape, compute_bytes, fused)
        + adapter.saved_inputs(shape, adapted, compute_bytes, casts=casts, dropout=lora_dropout)
        + len(adapted) * rank_r * compute_bytes
    )


def _saved_by_norms(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """Bytes per token saved by norms: the fp32 upcast of the input, or with a fused norm the input itself."""
    width = compute_bytes if fused else 4
    heads = (shape.heads + shape.kv_heads) * shape.head_dim * bool(shape.qk_norm)
    return width * (shape.norms * shape.hidden + heads)


def _saved_by_attention(shape: LayerShape, compute_bytes: int, seq_len: int) -> int:
    """Bytes per token. Flash: q, k, v, output, a log-sum-exp per head. Eager: q, k, v, fp32 softmax and its cast."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    saved = compute_bytes * (queries + 2 * keys)
    if shape.attention == "eager":
        return saved + shape.heads * seq_len * (4 + (compute_bytes if compute_bytes < 4 else 0))
    if sum(linear.reads == "attention_in" for linear in shape.linears) == 1:
        saved += compute_bytes * (queries + keys)  # v is a view, and keeps all of the fused projection alive
    return saved + compute_bytes * queries + 4 * shape.heads


def _saved_by_activation(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """Bytes per token. Gated: gate, activation(gate) and up (fused: gate and up). GELU: its input. ReLU: its output.

    `LoraMethod.saved_inputs` counts what the last linear reads; ReLU's output is that very tensor.
    """
    tensors = {"gated": 2 if fused else 3, "gelu": 1, "relu": 0}[shape.mlp]
    return tensors * shape.intermediate * compute_bytes
