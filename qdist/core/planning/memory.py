"""How many bytes will a GPU need to fine-tune a model? Derived term by term from shapes, not fitted."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import ceil

import msgspec

from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import LORA, trained_matrices
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.core.model.storage import expert_matrix_bytes, experts_bytes, matrix_bytes
from qdist.core.planning.activations import Recurrence, saved_bytes_per_token, working_bytes_per_token
from qdist.core.planning.loss import fused_loss_bytes

GATHERED_LAYERS = 2
"""Buffers that a sharded backbone keeps beside its own part, each for the widest layer: of the layer in use and of the
next, which is gathered ahead. Alignment adds less than 6 KiB to a layer of four ranks, and is not counted."""
GATHERED_TABLES = 1
"""The same for embedding and head, which are used at different times."""
STAGED_LAYERS = 2
"""Packed layers of an offloaded backbone on the GPU: the one in use and the one being copied."""
STAGE_WIDTH = 64
"""Micro-batches of a pipeline's step are padded to the longest, rounded up to this: buffers between stages have fixed
shapes."""
_REDUCE_BUCKET = 50_000_000
"""Elements of the flat buffer into which ZeRO 2 and 3 reduce gradients (`reduce_bucket_size` of ds_configs/)."""
_EIGHT_BIT_BLOCK, _EIGHT_BIT_FROM = 256, 4096
"""Numbers that share a scale in bitsandbytes 0.50's AdamW8bit, and parameters of the smallest tensor in 8 bits."""
EIGHT_BIT_CODES = 2 * 4 * 256
"""Bytes of the values that its bytes stand for, signed and unsigned, in fp32; one pair for all tensors."""
UNMEASURED_SHARE = 0.1
"""Margin of a family whose activations nobody has measured, as a share of what is predicted for them."""


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
    """Bytes of the loss beyond that working set, which is not alive yet."""
    gathers: int
    """Communication buffers, and layers of a sharded or offloaded backbone that were brought in to be used."""
    context: int
    """CUDA context, libraries and NCCL's buffers, which torch does not count."""
    pageable: int = 0
    """Moments in paged memory: on the GPU if there is room, otherwise in host memory."""
    margin: int = 0
    """Added for a family whose activations nobody has measured."""

    @property
    def total(self) -> int:
        """Expected peak bytes if there is room, CUDA context included."""
        return sum(msgspec.structs.astuple(self))

    @property
    def required(self) -> int:
        """Bytes that the run needs at least: without what can be paged out."""
        return self.total - self.pageable


class TrainingShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a run's computation that do not depend on where its layers are."""

    bits: int
    double_quant: bool = True
    mxfp4: bool = False
    """Whether experts are in MXFP4; `bits` are then of the linears alone."""
    gptq: Gptq | None = None
    """GPTQ packing used instead, at its own width."""
    compute_bytes: int = 2
    """Bytes of a computed number: 2 under autocast to 16 bits, 4 on a CPU."""
    fp8: bool = False
    """Whether products with packed linears are in fp8."""
    rank_r: int
    targets: tuple[str, ...]
    """What LoRA adapts: leaf names of linears, 'experts', 'experts.down_proj'."""
    adapter: LoraMethod = LORA
    seq_len: int
    fused_loss: bool = False
    """Whether cross entropy is computed from hidden states in chunks."""
    fused_layers: bool = False
    """Whether RMS norm and gated activation are fused (Liger)."""
    fused_lora: bool = False
    """Whether qdist's adapted linears replace peft's: neither casts nor masks of dropout are kept."""
    lora_dropout: bool = False
    shared_reads: bool = False
    """Whether linears that read one tensor share the passes over it: one thin product for all their A."""
    grouped: bool = True
    """Whether one kernel multiplies all experts of a layer, for which all their matrices are unpacked."""
    recurrence: Recurrence = "torch"
    """Which kernel recurrent layers run."""
    eight_bit: bool = False
    """Whether AdamW's two moments are in 8 bits, with a scale for each block of numbers; else in fp32."""
    optimizer_on_gpu: bool = True
    """False when the moments are offloaded; ZeRO's fp32 copy is counted all the same."""
    paged: bool = False
    """Whether the moments are in paged memory; needs `optimizer_on_gpu`."""


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of a model that one GPU works on, and how. Tuples count layers, aligned with the runs of the model's."""

    layers: tuple[int, ...]
    checkpointed: int
    """Number of its layers, from the first, recomputed in the backward pass; the others keep their activations."""
    micro_batch: int
    positions: int = 0
    """Positions in the fullest micro-batch, if the data were counted; 0 means `micro_batch` whole sequences."""
    learned: int = 0
    """Tokens with a loss in the fullest micro-batch; 0 means all."""
    gradient_accumulation: int = 1
    """Above 1, as with DeepSpeed's buffers, gradients live on through the next forward pass."""
    embedding: bool = True
    head: bool = True
    """The output head, the last norm and the loss."""
    shards: int = 1
    """GPUs that hold the frozen weights between them; the adapter is whole on each."""
    whole_tables: bool = False
    """Whether embedding and head are left unsharded."""
    zero_stage: int = 0
    data_parallel: int = 1
    """Ranks between which ZeRO divides the state of this share's adapter."""
    narrow: bool = False
    """Whether gradients are added up in 16 bits, and what that leaves of them is kept."""
    pipelined: bool = False
    """Whether it is a pipeline stage: gradients accumulate over all micro-batches before ZeRO divides anything."""
    persistent_gradients: bool = False
    """Whether gradients stay allocated between micro-batches and steps, as a CUDA graph adds them up in place."""
    in_flight: int = 1
    """Micro-batches whose activations are kept at a time."""
    received: int = 0
    """Receive buffers for what a stage's neighbours send ahead, each the hidden states of one micro-batch."""
    sends: bool = False
    """Whether a later stage reads its output, which is kept with the other activations."""
    offloaded: tuple[int, ...] = ()
    """Number of its layers, by run, whose packed weights are offloaded to host memory; empty for none."""
    context_bytes: int = 0

    def tokens(self, seq_len: int) -> int:
        """Tokens of the fullest micro-batch, padding included."""
        return self.positions or self.micro_batch * seq_len

    @property
    def recomputed(self) -> tuple[int, ...]:
        """Number of its recomputed layers, by run."""
        return first_of(self.layers, self.checkpointed)


def first_of(layers: Sequence[int], number: int) -> tuple[int, ...]:
    """The first `number` of `layers`, counted by run as they are."""
    before = accumulate(layers, initial=0)
    return tuple(min(count, max(0, number - start)) for count, start in zip(layers, before, strict=False))


class LayerSizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of a decoder layer and of one token in it, in bytes unless noted."""

    packed: int
    """Bytes of the frozen layer."""
    packed_experts: int
    """Those of them that are matrices of experts."""
    trained: int
    """Adapter parameters."""
    moments: int
    """Bytes of their moments."""
    saved_token: int
    casts: int
    """Bytes of the LoRA matrices in 16 bits that a layer of peft's keeps for the backward pass."""
    working: int
    working_token: int
    """Bytes per token alive only while the backward pass is in the MLP, where it is widest; in fp8 with the quantized
    gradient of the widest output, a byte an element."""
    loading: int
    """Bytes alive while its largest matrix is loaded: it arrives whole, then is packed."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes that follow from model and job alone: bytes of a layer, and of one token in it. Counted once per plan."""

    facts: ModelFacts
    job: TrainingShape
    layers: tuple[LayerSizes, ...]
    """Sizes of one layer of each run."""
    embedding: int
    head: int
    """Bytes of the output head, unless tied to the embedding, and of the norms outside the layers."""
    entering_token: int
    """Bytes per token of a layer's input."""

    @property
    def table(self) -> int:
        """Bytes of the token embedding, or of the head, alone."""
        return self.facts.vocab * self.facts.hidden * self.job.compute_bytes

    @property
    def widest_layer(self) -> int:
        """Bytes of the largest packed layer."""
        return max(own.packed for own in self.layers)

    def packed(self, counts: Iterable[int]) -> int:
        """Bytes of these counts of packed layers by run."""
        return sum(count * own.packed for count, own in zip(counts, self.layers, strict=False))

    def trained(self, counts: Iterable[int]) -> int:
        """Adapter parameters of these counts of layers by run."""
        return sum(count * own.trained for count, own in zip(counts, self.layers, strict=False))

    def moments(self, counts: Iterable[int]) -> int:
        """Bytes of the moments of these counts of layers by run, all of them on one GPU."""
        layers = sum(count * own.moments for count, own in zip(counts, self.layers, strict=False))
        return layers + EIGHT_BIT_CODES * self.job.eight_bit

    def held_by(self, layers: Iterable[int]) -> int:
        """Bytes of packed layers by their place in the model."""
        run_of_layer = self.facts.run_of_layer
        return sum(self.layers[run_of_layer[layer]].packed for layer in layers)


def sizes(facts: ModelFacts, job: TrainingShape) -> Sizes:
    """Count a model's parts. Raises ModelError when the model does not have a target of the adapter."""
    facts.require_targets(job.targets)
    head = (0 if facts.tied_embeddings else facts.vocab * facts.hidden) + facts.outer_norm_parameters
    first = (facts.vocab + facts.learned_positions) * facts.hidden + facts.outer_parameters
    return Sizes(
        facts=facts,
        job=job,
        layers=tuple(_layer_sizes(shape, job) for shape in facts.shapes),
        embedding=first * job.compute_bytes,
        head=head * job.compute_bytes,
        entering_token=facts.hidden * job.compute_bytes,
    )


def _layer_sizes(shape: LayerShape, job: TrainingShape) -> LayerSizes:
    if shape.attention == "joined" and job.fused_layers:
        shape = msgspec.structs.replace(shape, attention="flash")
    matrices = trained_matrices(shape, job.rank_r, job.targets, job.adapter)
    saved = saved_bytes_per_token(
        shape, bits=job.bits, compute_bytes=job.compute_bytes, rank_r=job.rank_r, targets=job.targets,
        adapter=job.adapter, seq_len=job.seq_len, fused_layers=job.fused_layers, fused_lora=job.fused_lora,
        lora_dropout=job.lora_dropout, recurrence=job.recurrence,
    )  # fmt: skip
    cast = sum(job.adapter.parameters(linear, job.rank_r) for linear in shape.targeted(job.targets))
    return LayerSizes(
        packed=packed_layer_bytes(shape, job),
        packed_experts=_experts_bytes(shape, job),
        trained=sum(matrices),
        moments=sum(eight_bit_moments(count) if job.eight_bit else 8 * count for count in matrices),
        saved_token=saved,
        casts=cast * job.compute_bytes if job.compute_bytes < 4 and not job.fused_lora else 0,
        working=_unpacked_bytes(shape, job),
        working_token=working_bytes_per_token(
            shape,
            compute_bytes=job.compute_bytes,
            targets=job.targets,
            seq_len=job.seq_len,
            recurrence=job.recurrence,
            fused=job.fused_layers and shape.norm == "rms",
        )
        + job.fp8 * max((linear.outputs for linear in shape.linears), default=0),
        loading=_loading_bytes(shape, job),
    )


def _unpacked_bytes(shape: LayerShape, job: TrainingShape) -> int:
    """Bytes of the weights unpacked at a time in the backward pass.

    The largest matrix: of bitsandbytes' 4 bits on a GPU once, as its kernel writes the type of the product; otherwise
    twice, dequantized and in that type. In fp8 a byte a weight, of GPTQ beside the dequantized. A 16-bit backbone has
    the matrix already; this is too small to tell. Of experts one parameter is unpacked at a time: for a grouped product
    all its matrices, otherwise one in turn.
    """
    once = job.bits == 4 and job.gptq is None and job.compute_bytes < 4
    linear = (1 if once else 2) * shape.largest_matrix * job.compute_bytes
    if job.fp8:
        linear = (1 if job.gptq is None else 1 + job.compute_bytes) * shape.largest_matrix
    if shape.experts is None or (job.bits == 16 and not job.mxfp4):
        return linear
    widest = max(matrix.weights for matrix in shape.experts.matrices)
    return max(linear, (shape.experts.count if job.grouped else 1) * widest * job.compute_bytes)


def _loading_bytes(shape: LayerShape, job: TrainingShape) -> int:
    """Bytes of the largest matrix, an expert's included, before and after it is packed."""
    found = [
        linear.weights * job.compute_bytes + (_packed_bytes(linear, job) if job.bits < 16 else 0)
        for linear in sorted(shape.linears, key=lambda linear: linear.weights)[-1:]
    ]
    if experts := shape.experts:
        widest = max(experts.matrices, key=lambda matrix: matrix.weights)
        packed = expert_matrix_bytes(experts, widest, bits=job.bits, double=job.double_quant, mxfp4=job.mxfp4)
        found.append(widest.weights * job.compute_bytes + packed * (job.bits < 16 or job.mxfp4))
    return max(found, default=0)


def budget(sizes: Sizes, share: Share) -> MemoryBudget:
    """Bytes on one GPU at the peak of a training step with AdamW on LoRA parameters."""
    facts, job = sizes.facts, sizes.job
    tokens = share.tokens(job.seq_len)
    trained, layers = sizes.trained(share.layers), sum(share.layers)
    kept, anew = _kept(sizes, share, tokens)
    work = max(own.working + tokens * own.working_token for own in _kinds(sizes, share))
    work += anew * (share.checkpointed == layers)
    staged = max(own.packed for own in _kinds(sizes, share)) * STAGED_LAYERS * any(share.offloaded)
    learned = share.learned or tokens
    loss = _loss_bytes(facts, tokens=learned, compute_bytes=job.compute_bytes, fused=job.fused_loss) * share.head
    logits = max(0, loss - work - staged)
    divided = share.zero_stage >= 2 and not share.pipelined
    gradients = 4 * trained // (share.data_parallel if divided else 1)
    emptied = share.zero_stage == 0 and not share.persistent_gradients
    if share.gradient_accumulation == share.data_parallel == 1 and emptied:
        # They fill as the backward pass frees what was kept; only their excess raises the peak.
        late = anew * (0 < share.checkpointed < layers)
        gradients = max(0, gradients + late - kept - logits)
    held = _optimizer_bytes(trained, sizes.moments(share.layers), share.zero_stage, share.data_parallel)
    moments = held - _optimizer_bytes(trained, 0, share.zero_stage, share.data_parallel)
    return MemoryBudget(
        weights=weight_bytes(sizes, share),
        adapter=4 * trained,
        gradients=gradients,
        optimizer=held - moments * (job.paged or not job.optimizer_on_gpu),
        pageable=moments * (job.paged and job.optimizer_on_gpu),
        activations=kept + work,
        logits=logits,
        gathers=staged
        + gather_buffer_bytes(sizes, share)
        + (4 * min(_REDUCE_BUCKET, trained) if share.zero_stage >= 2 else 0)
        + (4 * (trained + ceil(trained / share.data_parallel)) if share.narrow else 0)
        + share.received * tokens * sizes.entering_token,
        context=share.context_bytes,
        margin=0 if facts.measured else int(UNMEASURED_SHARE * (kept + work)),
    )


def resident(own: MemoryBudget) -> MemoryBudget:
    """The same budget with moments that stay on the GPU."""
    return msgspec.structs.replace(own, optimizer=own.optimizer + own.pageable, pageable=0)


def load_peak_bytes(sizes: Sizes, share: Share) -> int:
    """Peak bytes of a GPU while its part of the backbone is loaded, one matrix at a time, and gathered once."""
    loading = max(own.loading for own in _kinds(sizes, share))
    return weight_bytes(sizes, share) + max(loading, gather_buffer_bytes(sizes, share)) + share.context_bytes


def weight_bytes(sizes: Sizes, share: Share) -> int:
    """Bytes of frozen weights that stay on one GPU: its layers, or its shard of them, and the tables."""
    layers = sizes.packed(share.layers) - sizes.packed(share.offloaded)
    own_table = share.head and not share.embedding and sizes.facts.tied_embeddings
    tables = sizes.embedding * share.embedding + sizes.head * share.head + sizes.table * own_table
    sharded = sizes.table * (share.embedding + share.head) * _shards_tables(sizes, share)
    return ceil((layers + sharded) / share.shards) + tables - sharded


def packed_layer_bytes(shape: LayerShape, job: TrainingShape) -> int:
    """Bytes of one frozen decoder layer: packed linears and experts, with biases, norms and what is kept in 16 bits."""
    rest = shape.parameters - shape.weights
    stated = job.gptq.layer_bytes if job.gptq else 0
    packed = stated or sum(_packed_bytes(linear, job) for linear in shape.linears)
    return packed + _experts_bytes(shape, job) + rest * job.compute_bytes


def _experts_bytes(shape: LayerShape, job: TrainingShape) -> int:
    """Bytes of the packed matrices of a layer's experts; 0 without any."""
    return (
        0
        if shape.experts is None
        else experts_bytes(
            shape.experts, bits=job.bits, double=job.double_quant, mxfp4=job.mxfp4, plain_bytes=job.compute_bytes
        )
    )


def _packed_bytes(linear: Linear, job: TrainingShape) -> int:
    if job.gptq:
        return job.gptq.bytes_of(linear.name, linear.inputs, linear.outputs)
    return matrix_bytes(
        linear.inputs, linear.outputs, bits=job.bits, double=job.double_quant, plain_bytes=job.compute_bytes
    )


def _shards_tables(sizes: Sizes, share: Share) -> bool:
    return share.shards > 1 and not share.whole_tables and not sizes.facts.tied_embeddings


def _kept(sizes: Sizes, share: Share, tokens: int) -> tuple[int, int]:
    """Bytes kept when the backward pass begins, and what one checkpointed layer then computes anew.

    Non-reentrant checkpointing keeps each layer's input, and saves a layer anew when the backward pass enters it. Where
    the last layers are not checkpointed, they are gone by then and leave room for that.
    """
    entering, recomputed = tokens * sizes.entering_token, share.recomputed
    once = share.checkpointed * entering + entering * share.sends
    for own, count, anew in zip(sizes.layers, share.layers, recomputed, strict=True):
        once += (count - anew) * (tokens * own.saved_token + own.casts)
    anew_token = max(own.saved_token for own in _kinds(sizes, share))
    return share.in_flight * once, tokens * anew_token


def _kinds(sizes: Sizes, share: Share) -> Sequence[LayerSizes]:
    """The kinds of layers that a share has any of; all of them for a share without layers."""
    return [own for own, count in zip(sizes.layers, share.layers, strict=True) if count] or sizes.layers


def gather_buffer_bytes(sizes: Sizes, share: Share) -> int:
    """Bytes of the buffers that a sharded backbone is gathered into, which are kept all along; otherwise 0."""
    if share.shards == 1:
        return 0
    widest = max(own.packed for own in _kinds(sizes, share))
    return GATHERED_LAYERS * widest + GATHERED_TABLES * sizes.table * _shards_tables(sizes, share)


def _loss_bytes(facts: ModelFacts, *, tokens: int, compute_bytes: int, fused: bool) -> int:
    """Logits, and what cross entropy makes of them.

    torch's backward pass of log_softmax holds three fp32 tensors at once: the log-probabilities, their gradient and
    that of the logits (12.2 bytes a logit seen on a CPU; the forward pass, 16-bit logits included, takes 10.1).
    """
    if not fused:
        return tokens * facts.vocab * 12
    return fused_loss_bytes(tokens, facts.vocab, facts.hidden, compute_bytes)


def _optimizer_bytes(trained: int, moments: int, zero_stage: int, data_parallel: int) -> int:
    """Moments, whole; under ZeRO this rank's part, with the fp32 copy of the parameters that it steps."""
    return moments if zero_stage == 0 else ceil((moments + 4 * trained) / data_parallel)


def eight_bit_moments(parameters: int) -> int:
    """Bytes of the two moments of one tensor in bitsandbytes' AdamW8bit: of small tensors they stay in fp32."""
    if parameters < _EIGHT_BIT_FROM:
        return 8 * parameters
    return 2 * parameters + 2 * 4 * ceil(parameters / _EIGHT_BIT_BLOCK)
