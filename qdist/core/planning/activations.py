"""How much does autograd keep of one token in one decoder layer? Counted tensor by tensor."""

from qdist.core.model.shapes import LayerShape, Linear


def saved_bytes_per_token(
    shape: LayerShape,
    *,
    bits: int,
    compute_bytes: int,
    rank_r: int,
    targets: tuple[str, ...],
    pool: int = 1,
    seq_len: int,
    fused_layers: bool,
    fused_lora: bool,
    lora_dropout: bool,
) -> int:
    """What autograd keeps of one token in one decoder layer: each distinct tensor once.

    A frozen linear keeps nothing of its input, LoRA's A keeps its input and B the rank-wide product.
    fused_lora: our own adapted linears, which cast nothing; peft's otherwise. pool: above 1, QA-LoRA.
    tests/core/planning/test_memory.py holds these terms against the tensors that torch saves.
    """
    adapted = shape.targeted(targets)
    fused = fused_layers and shape.norm == "rms"
    return (
        _saved_by_norms(shape, compute_bytes, fused)
        + _saved_by_attention(shape, compute_bytes, seq_len)
        + _saved_by_activation(shape, compute_bytes, fused)
        + (
            _saved_linear_inputs(shape, adapted, bits, compute_bytes, fused_lora, lora_dropout)
            if pool == 1
            else _saved_pooled_inputs(shape, adapted, pool, compute_bytes, lora_dropout)
        )
        + len(adapted) * rank_r * compute_bytes
    )


def _saved_by_norms(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """A norm computes in fp32 and keeps its upcast input; a fused one keeps the input as it is."""
    width = compute_bytes if fused else 4
    heads = (shape.heads + shape.kv_heads) * shape.head_dim * bool(shape.qk_norm)
    return width * (shape.norms * shape.hidden + heads)


def _saved_by_attention(shape: LayerShape, compute_bytes: int, seq_len: int) -> int:
    """Flash: q, k, v, the output, and a log-sum-exp for each head. Eager: q, k, v, the fp32 softmax and its cast."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    saved = compute_bytes * (queries + 2 * keys)
    if shape.attention == "eager":
        return saved + shape.heads * seq_len * (4 + (compute_bytes if compute_bytes < 4 else 0))
    if sum(linear.reads == "attention_in" for linear in shape.linears) == 1:
        saved += compute_bytes * (queries + keys)  # v is a view, and keeps all of the fused projection alive
    return saved + compute_bytes * queries + 4 * shape.heads


def _saved_by_activation(shape: LayerShape, compute_bytes: int, fused: bool) -> int:
    """Gated: gate, activation(gate) and up (fused: gate and up). GELU: its input. ReLU: its output.

    `_saved_linear_inputs` counts what the last linear reads; ReLU's output is that very tensor.
    """
    tensors = {"gated": 2 if fused else 3, "gelu": 1, "relu": 0}[shape.mlp]
    return tensors * shape.intermediate * compute_bytes


def _saved_linear_inputs(
    shape: LayerShape,
    adapted: tuple[Linear, ...],
    bits: int,
    compute_bytes: int,
    fused_lora: bool,
    lora_dropout: bool,
) -> int:
    """Inputs that LoRA's A matrices keep. One tensor serves all that read it, except that

    dropout gives each reader its own masked copy and a mask (bytes on a GPU, floats on a CPU); peft casts the input
    of a 16-bit linear to fp32, and a layer norm leaves autocast in fp32, so each reader casts its own back.
    """
    autocast = compute_bytes < 4
    own = sum(linear.inputs for linear in adapted)
    widths = {linear.reads: linear.inputs for linear in adapted}
    if shape.attention == "flash":
        widths.pop("attention_out", None)  # attention has kept it already
    if lora_dropout:
        kept = shape.intermediate * (shape.mlp == "relu")
        return (own + kept) * compute_bytes + own * (1 if autocast else 4)
    if autocast and bits == 16 and not fused_lora:
        return own * compute_bytes
    if shape.mlp == "relu":
        widths["mlp_out"] = shape.intermediate
    behind_norms = [linear for linear in adapted if linear.reads in ("attention_in", "mlp_in")]
    copies = len(behind_norms) - len({linear.reads for linear in behind_norms})
    extra = copies * shape.hidden if autocast and shape.norm == "layer" else 0
    return (sum(widths.values()) + extra) * compute_bytes


def _saved_pooled_inputs(
    shape: LayerShape, adapted: tuple[Linear, ...], pool: int, compute_bytes: int, lora_dropout: bool
) -> int:
    """QA-LoRA's A keeps the pooled input alone, each reader its own; dropout keeps its masks, peft pools in fp32."""
    own = sum(linear.inputs for linear in adapted)
    kept = shape.intermediate * compute_bytes * (shape.mlp == "relu")
    if lora_dropout:
        return kept + own // pool * 4 + own * (1 if compute_bytes < 4 else 4)
    return kept + own // pool * compute_bytes
