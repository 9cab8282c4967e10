"""How many bytes will a GPU need to fine-tune a model? Derived term by term from shapes, not fitted.

The peak is the larger of two moments of a micro-batch. At the *loss* everything kept for the backward pass and the
logits are alive. In the *backward pass* the logits are gone and one layer's working set is alive: at its start beside
all that was kept, at its end beside all gradients. `budget` reports the two moments as one sum: what a later moment
reuses is not counted twice.
"""

from math import ceil

import msgspec

from qdist.core.facts import Linear, ModelFacts

_BLOCK, _NESTED_BLOCK = 64, 256
"""bitsandbytes: weights that share an absmax, and absmaxes that share one when they are quantized in turn."""
_REDUCE_BUCKET = 50_000_000
"""Elements of the flat buffer into which ZeRO 2 and 3 reduce gradients (`reduce_bucket_size` of ds_configs/)."""
_LOSS_CHUNKS = 8
"""A fused loss walks the tokens in at least this many pieces: Liger splits by vocab / hidden, 8 for Llama-7B."""


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes on one GPU at the fullest moment of training."""

    weights: int
    """The frozen backbone: packed linears, and embeddings, norms, biases and lm_head in 16 bits."""
    adapter: int
    """LoRA parameters in fp32."""
    gradients: int
    """fp32; only what exceeds the activations they replace, when they start empty with each micro-batch."""
    optimizer: int
    """Moments, and ZeRO's flat fp32 copy of the parameters."""
    activations: int
    """Kept for the backward pass, and the working set of the layer it is in."""
    logits: int
    """What the loss needs beyond that working set, which is not alive yet."""
    gathers: int
    """Communication buffers, and layers of a sharded backbone gathered to be used."""
    context: int
    """CUDA context, libraries and NCCL's buffers, which torch does not count."""
    pageable: int = 0
    """Moments in paged memory: on the GPU while there is room, in host memory where there is none."""

    @property
    def total(self) -> int:
        """The peak that is expected where there is room, CUDA context included."""
        return sum(msgspec.structs.astuple(self))

    @property
    def required(self) -> int:
        """The least that the run needs: what can be paged out left out."""
        return self.total - self.pageable


def budget(
    facts: ModelFacts,
    *,
    bits: int,
    double_quant: bool,
    compute_bytes: int,
    rank_r: int,
    targets: tuple[str, ...],
    micro_batch: int,
    seq_len: int,
    checkpointing: bool,
    zero_stage: int,
    world_size: int,
    fused_loss: bool,
    context_bytes: int,
    fused_layers: bool = False,
    lora_dropout: bool = False,
    gradient_accumulation: int = 1,
    optimizer_bytes_per_param: int = 8,
    optimizer_on_gpu: bool = True,
    paged: bool = False,
    shards: int = 1,
) -> MemoryBudget:
    """What one GPU holds at the peak of a training step with AdamW on LoRA parameters.

    bits: 4, 8 or 16. compute_bytes: 2 under bf16 autocast, 4 on a CPU. targets: leaf names that LoRA adapts.
    fused_loss: cross entropy from hidden states in chunks. fused_layers: fused RMS norm and gated activation (Liger).
    gradient_accumulation: above 1, as with DDP's and DeepSpeed's buffers, gradients live on through the next forward.
    optimizer_on_gpu: False when the moments are offloaded; ZeRO's fp32 copy is counted all the same.
    paged: the moments are in paged memory; needs optimizer_on_gpu.
    shards: GPUs, out of `world_size`, that hold one copy of backbone and adapter between them (FSDP2).

    Raises ModelError when a target is no linear of the model.
    """
    tokens = micro_batch * seq_len
    trained = ceil(facts.adapter_parameters(rank_r, targets) / shards)
    layer_bytes = packed_layer_bytes(facts, bits=bits, double_quant=double_quant, compute_bytes=compute_bytes)
    outside = facts.embedding_parameters + facts.norm_parameters - facts.layers * facts.norm_parameters_per_layer
    weights = facts.layers * layer_bytes + outside * compute_bytes

    saved = tokens * saved_bytes_per_token(
        facts, bits=bits, compute_bytes=compute_bytes, rank_r=rank_r, targets=targets, seq_len=seq_len,
        fused_layers=fused_layers, lora_dropout=lora_dropout,
    )  # fmt: skip
    work = _backward_work(facts, tokens=tokens, compute_bytes=compute_bytes)
    # Non-reentrant checkpointing keeps each layer's input, and saves a layer anew when the backward pass enters it.
    kept = facts.layers * (tokens * facts.hidden * compute_bytes if checkpointing else saved)
    if not checkpointing and compute_bytes < 4:
        # Autocast casts each fp32 LoRA matrix once, and the matmuls that use the cast keep it.
        kept += facts.adapter_parameters(rank_r, targets) * compute_bytes
    if checkpointing:
        work += saved

    loss = _loss_bytes(facts, tokens=tokens, compute_bytes=compute_bytes, fused=fused_loss)
    logits = max(0, loss - work)
    gradients = trained * 4 // (world_size if zero_stage >= 2 else 1)
    if gradient_accumulation == 1 and world_size == shards and zero_stage == 0:
        # They fill as the backward pass frees what was kept; only their excess raises the peak.
        gradients = max(0, gradients - kept - logits)
    gathers = 4 * min(_REDUCE_BUCKET, trained) if zero_stage >= 2 else 0
    if shards > 1:
        weights = ceil(weights / shards)
        gathers += 2 * (layer_bytes + 4 * trained * shards // facts.layers)  # the layer in use and the next one
    held = _optimizer_bytes(trained, optimizer_bytes_per_param, zero_stage, world_size)
    moments = held - _optimizer_bytes(trained, 0, zero_stage, world_size)
    return MemoryBudget(
        weights=weights,
        adapter=4 * trained,
        gradients=gradients,
        optimizer=held - moments * (paged or not optimizer_on_gpu),
        pageable=moments * (paged and optimizer_on_gpu),
        activations=kept + work,
        logits=logits,
        gathers=gathers,
        context=context_bytes,
    )


def packed_layer_bytes(facts: ModelFacts, *, bits: int, double_quant: bool, compute_bytes: int) -> int:
    """One frozen decoder layer: packed linears, with their biases and the norms in 16 bits."""
    rest = facts.layer_parameters - sum(linear.weights for linear in facts.linears)
    packed = sum(_packed_bytes(linear, bits, double_quant, compute_bytes) for linear in facts.linears)
    return packed + rest * compute_bytes


def _packed_bytes(linear: Linear, bits: int, double_quant: bool, compute_bytes: int) -> int:
    """A frozen weight matrix and what its quantization needs to undo itself."""
    if bits == 16:
        return linear.weights * compute_bytes
    if bits == 8:
        return linear.weights + 4 * linear.outputs  # LLM.int8: an fp32 scale for each output row
    blocks = ceil(linear.weights / _BLOCK)
    # QLoRA section 3: absmax in fp32, or in 8 bits with an fp32 absmax of its own and one fp32 offset.
    absmax = blocks + 4 * ceil(blocks / _NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return ceil(linear.weights / 2) + absmax


def saved_bytes_per_token(
    facts: ModelFacts,
    *,
    bits: int,
    compute_bytes: int,
    rank_r: int,
    targets: tuple[str, ...],
    seq_len: int,
    fused_layers: bool,
    lora_dropout: bool,
) -> int:
    """What autograd keeps of one token in one decoder layer: each distinct tensor once.

    A frozen linear keeps nothing of its input, LoRA's A keeps its input and B the rank-wide product.
    tests/core/test_memory.py holds these terms against the tensors that torch saves.
    """
    adapted = facts.targeted(targets)
    fused = fused_layers and facts.norm == "rms"
    return (
        _saved_by_norms(facts, compute_bytes, fused)
        + _saved_by_attention(facts, compute_bytes, seq_len)
        + _saved_by_activation(facts, compute_bytes, fused)
        + _saved_linear_inputs(facts, adapted, bits, compute_bytes, lora_dropout)
        + len(adapted) * rank_r * compute_bytes
    )


def _saved_by_norms(facts: ModelFacts, compute_bytes: int, fused: bool) -> int:
    """A norm computes in fp32 and keeps its upcast input; a fused one keeps the input as it is."""
    width = compute_bytes if fused else 4
    heads = (facts.heads + facts.kv_heads) * facts.head_dim * facts.qk_norm
    return width * (facts.norms_per_layer * facts.hidden + heads)


def _saved_by_attention(facts: ModelFacts, compute_bytes: int, seq_len: int) -> int:
    """Flash: q, k, v, the output, and a log-sum-exp for each head. Eager: q, k, v, the fp32 softmax and its cast."""
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    saved = compute_bytes * (queries + 2 * keys)
    if facts.attention == "eager":
        return saved + facts.heads * seq_len * (4 + (compute_bytes if compute_bytes < 4 else 0))
    if sum(linear.reads == "attention_in" for linear in facts.linears) == 1:
        saved += compute_bytes * (queries + keys)  # v is a view, and keeps all of the fused projection alive
    return saved + compute_bytes * queries + 4 * facts.heads


def _saved_by_activation(facts: ModelFacts, compute_bytes: int, fused: bool) -> int:
    """Gated: gate, activation(gate) and up (fused: gate and up). GELU: its input. ReLU: its output.

    `_saved_linear_inputs` counts what the last linear reads; ReLU's output is that very tensor.
    """
    tensors = {"gated": 2 if fused else 3, "gelu": 1, "relu": 0}[facts.mlp]
    return tensors * facts.intermediate * compute_bytes


def _saved_linear_inputs(
    facts: ModelFacts, adapted: tuple[Linear, ...], bits: int, compute_bytes: int, lora_dropout: bool
) -> int:
    """Inputs that LoRA's A matrices keep. One tensor serves all that read it, except that

    dropout gives each reader its own masked copy and a mask (bytes on a GPU, floats on a CPU); peft casts the input
    of a 16-bit linear to fp32, and a layer norm leaves autocast in fp32, so each reader casts its own back.
    """
    autocast = compute_bytes < 4
    own = sum(linear.inputs for linear in adapted)
    widths = {linear.reads: linear.inputs for linear in adapted}
    if facts.attention == "flash":
        widths.pop("attention_out", None)  # attention has kept it already
    if lora_dropout:
        kept = facts.intermediate * (facts.mlp == "relu")
        return (own + kept) * compute_bytes + own * (1 if autocast else 4)
    if autocast and bits == 16:
        return own * compute_bytes
    if facts.mlp == "relu":
        widths["mlp_out"] = facts.intermediate
    behind_norms = [linear for linear in adapted if linear.reads in ("attention_in", "mlp_in")]
    copies = len(behind_norms) - len({linear.reads for linear in behind_norms})
    extra = copies * facts.hidden if autocast and facts.norm == "layer" else 0
    return (sum(widths.values()) + extra) * compute_bytes


def _backward_work(facts: ModelFacts, *, tokens: int, compute_bytes: int) -> int:
    """Alive only while the backward pass is in a layer's MLP, its widest place.

    Three gradients as wide as the MLP (of the product, the gate and up), and the largest weight matrix twice:
    dequantized, and in the type of the matmul. A 16-bit backbone has the matrix already; this is too small to tell.
    """
    matrix = max(linear.weights for linear in facts.linears)
    return (3 * tokens * facts.intermediate + 2 * matrix) * compute_bytes


def _loss_bytes(facts: ModelFacts, *, tokens: int, compute_bytes: int, fused: bool) -> int:
    """Logits, and what cross entropy makes of them.

    torch's backward pass of log_softmax holds three fp32 tensors at once: the log-probabilities, their gradient and
    that of the logits (12.2 bytes a logit seen on a CPU; the forward pass, 16-bit logits included, takes 10.1).
    Fused: the same for a chunk of the tokens, and the gradient of all hidden states.
    """
    if not fused:
        return tokens * facts.vocab * 12
    chunk = ceil(tokens / max(_LOSS_CHUNKS, ceil(facts.vocab / facts.hidden)))
    return chunk * facts.vocab * (compute_bytes + 4) + tokens * facts.hidden * compute_bytes


def _optimizer_bytes(trained: int, bytes_per_param: int, zero_stage: int, world_size: int) -> int:
    """Moments, whole; under ZeRO this rank's part, with the fp32 copy of the parameters that it steps."""
    return trained * bytes_per_param if zero_stage == 0 else ceil(trained * (bytes_per_param + 4) / world_size)
