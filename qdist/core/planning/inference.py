"""What do generation, evaluation and GPTQ need: where are a model's layers, and how much memory is the peak?"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec

from qdist.core.errors import PlanError
from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import LORA
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import ALL_LINEAR, LayerShape, ModelFacts
from qdist.core.planning.activations import widths_of
from qdist.core.planning.candidates import USABLE_SHARE
from qdist.core.planning.layer_map import scattered, spread_layers
from qdist.core.planning.memory import STAGED_LAYERS, Sizes, TrainingShape, sizes
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES
from qdist.core.text import format_bytes

LOGIT_BYTES = 12
"""Bytes per logit that enters a loss, the logit and the output of log_softmax in float32, or that chooses a token."""


class Residence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where each part of a model is. GPUs have CUDA's numbers."""

    layer_gpu: tuple[int, ...] = ()
    """GPU of each decoder layer, never returning to an earlier one; empty on a CPU. The embedding is on the GPU of the
    first layer, final norm and head on that of the last."""
    offloaded: tuple[int, ...] = ()
    """Layers whose weights are offloaded to host memory and visit their GPU for each use."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """GPUs that hold anything, in the order in which a pass visits them."""
        return tuple(gpu for gpu, _ in groupby(self.layer_gpu))

    def __str__(self) -> str:
        """'backbone on GPU 0', 'layers 0-39 on GPU 0, 40-79 on GPU 1; 12 of 80 layers are offloaded to host memory'."""
        if not self.layer_gpu:
            return "backbone on the CPU"
        if len(self.gpus) == 1:
            text = f"backbone on GPU {self.gpus[0]}"
        else:
            runs = [list(run) for _, run in groupby(range(len(self.layer_gpu)), key=self.layer_gpu.__getitem__)]
            text = "layers " + ", ".join(
                f"{_range(run[0], run[-1])} on GPU {gpu}" for run, gpu in zip(runs, self.gpus, strict=True)
            )
        count = len(self.offloaded)
        waiting = f"{count} of {len(self.layer_gpu)} layers are offloaded to host memory"
        return f"{text}; {waiting}" if count else text


def _range(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)


class Footprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of a model's parts during generation or evaluation."""

    layers: tuple[int, ...]
    """Bytes of each decoder layer: weights, adapter, keys and values."""
    waiting: tuple[int, ...]
    """Bytes of each layer that leave the GPU when its weights are offloaded to host memory."""
    staged: int
    """Bytes on every GPU for offloaded layers brought in for use, if any layer is offloaded."""
    first: int
    """Bytes of what precedes the layers."""
    last: int
    """Bytes of what follows the layers."""
    everywhere: int
    """Bytes on every GPU: CUDA context, unpacked matrices, a layer's activations."""
    uncut: bool = False
    """Whether all layers must be on one GPU, since some of them read more than the hidden states of the one before."""

    @property
    def model(self) -> int:
        """Bytes of the whole model, wherever its parts are."""
        return self.first + sum(self.layers) + self.last

    @property
    def alone(self) -> int:
        """Bytes of one GPU that holds everything."""
        return self.everywhere + self.model


def footprint(
    facts: ModelFacts,
    *,
    bits: int,
    double_quant: bool,
    compute_bytes: int,
    mxfp4: bool = False,
    gptq: Gptq | None = None,
    tokens: int,
    at_a_time: int | None = None,
    rank_r: int = 0,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    adapter: LoraMethod = LORA,
    scored: int = 0,
) -> Footprint:
    """Count a model in use.

    tokens: of all sequences together, prompts and answers, for whose keys and values there is to be room.
    at_a_time: tokens that go through a layer together; None for all.
    rank_r: of the adapter, in float32; 0 without one.
    scored: tokens whose logits exist at a time, for a loss.
    """
    job = TrainingShape(
        bits=bits, double_quant=double_quant, compute_bytes=compute_bytes, mxfp4=mxfp4, gptq=gptq, rank_r=rank_r,
        targets=targets, adapter=adapter, seq_len=1,
    )  # fmt: skip
    return count_in_use(sizes(facts, job), tokens=tokens, at_a_time=at_a_time, scored=scored)


def count_in_use(
    parts: Sizes, *, tokens: int, at_a_time: int | None = None, scored: int = 0, adapters: Sequence[int] | None = None
) -> Footprint:
    """`footprint` of a model whose parts are counted.

    adapters: bytes of the adapters of a layer of each run; None for one adapter in float32.
    """
    facts, job = parts.facts, parts.job
    together = tokens if at_a_time is None else min(tokens, at_a_time)
    beside = adapters or [4 * own.trained for own in parts.layers]
    loss = scored * facts.vocab * LOGIT_BYTES
    layer = [
        own.packed + adapter + cache_bytes(shape, job.compute_bytes, tokens)
        for own, adapter, shape in zip(parts.layers, beside, facts.shapes, strict=True)
    ]
    waiting = [
        own.packed - (shape.parameters - shape.weights) * job.compute_bytes
        for own, shape in zip(parts.layers, facts.shapes, strict=True)
    ]
    return Footprint(
        layers=tuple(layer[run] for run in facts.run_of_layer),
        waiting=tuple(waiting[run] for run in facts.run_of_layer),
        staged=STAGED_LAYERS * parts.widest_layer,
        first=parts.embedding + loss * facts.tied_embeddings,
        last=parts.head + loss * (not facts.tied_embeddings),
        everywhere=CUDA_CONTEXT_BYTES + work_bytes(facts, job.compute_bytes, together),
        uncut=bool(facts.unsplit) or facts.together_from is not None,
    )


def cache_bytes(shape: LayerShape, compute_bytes: int, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in a layer: with a window no fewer."""
    return 2 * shape.kv_heads * shape.head_dim * compute_bytes * tokens


def work_bytes(facts: ModelFacts, compute_bytes: int, tokens: int) -> int:
    """Bytes of the activations of so many tokens in the widest layer, and of what it unpacks."""
    return max(
        max((2 * shape.largest_matrix + tokens * (4 * facts.hidden + 3 * shape.intermediate)) * compute_bytes,
            _experts_work(shape, tokens, compute_bytes))
        for shape in facts.shapes
    )  # fmt: skip


def _experts_work(shape: LayerShape, tokens: int, compute_bytes: int) -> int:
    """Bytes of one parameter unpacked, of all experts, and of each pair's rows: input, first product, gate, output."""
    experts = shape.experts
    if experts is None:
        return 0
    first, last = widths_of(experts)
    unpacked = experts.count * max(matrix.weights for matrix in experts.matrices)
    return (unpacked + tokens * experts.active * (2 * shape.hidden + first + last)) * compute_bytes


def room(free_bytes: int, cap_bytes: int | None) -> int:
    """Bytes of a GPU that may be filled. cap_bytes: the user's cap."""
    return int(USABLE_SHARE * min(free_bytes, free_bytes if cap_bytes is None else cap_bytes))


def reside(parts: Footprint, rooms: Sequence[int], *, host_bytes: int | None = None) -> Residence:
    """The first GPU that has room for everything; else whole layers over all that have room, as evenly full as can be;
    else the same with as few layers as possible in host memory.

    rooms: what may be filled of each GPU. host_bytes: free host memory; None where waiting layers take none anew.

    Raises PlanError where not even that fits.
    """
    one, count = parts.alone, len(parts.layers)
    for gpu, own in enumerate(rooms):
        if one <= own:
            return Residence(layer_gpu=(gpu,) * count)
    for waiting in range(count + 1):
        offloaded = scattered(count, waiting)
        layer_bytes = list(parts.layers)
        for layer in offloaded:
            layer_bytes[layer] -= parts.waiting[layer]
        staged = parts.staged if waiting else 0
        layer_gpu = _placed(layer_bytes, parts, [own - staged for own in rooms])
        if layer_gpu is not None:
            _require_host_memory(parts, offloaded, host_bytes)
            return Residence(layer_gpu=layer_gpu, offloaded=offloaded)
    least = one - sum(parts.waiting) + parts.staged
    raise PlanError(
        f"even with all {count} layers in host memory the model takes {format_bytes(least)} of a GPU; "
        f"there is room for {', '.join(map(format_bytes, rooms))}",
        try_="more free GPU memory, smaller batches or shorter answers, or the CPU (CUDA_VISIBLE_DEVICES= )",
    )


def _placed(layer_bytes: Sequence[int], parts: Footprint, rooms: Sequence[int]) -> tuple[int, ...] | None:
    """GPU of each layer, or None if they do not fit; uses the widest run of GPUs that holds them."""
    count = len(rooms)
    for width in range(1 if parts.uncut else count, 0, -1):
        for start in range(count - width + 1):
            found = _placed_on(range(start, start + width), layer_bytes, parts, rooms)
            if found is not None:
                return found
    return None


def _placed_on(
    gpus: range, layer_bytes: Sequence[int], parts: Footprint, rooms: Sequence[int]
) -> tuple[int, ...] | None:
    """The same for given GPUs: the first also holds what precedes the layers, the last what follows them."""
    budgets = [rooms[gpu] - parts.everywhere for gpu in gpus]
    budgets[0] -= parts.first
    budgets[-1] -= parts.last
    useful = [max(0, budget) for budget in budgets]
    if budgets[0] < layer_bytes[0] or budgets[-1] < layer_bytes[-1] or sum(useful) < sum(layer_bytes):
        return None
    places = list(spread_layers(layer_bytes, useful))
    places[0], places[-1] = 0, len(gpus) - 1  # both ends hold something already, and one layer fits beside it
    held = [0] * len(gpus)
    for size, place in zip(layer_bytes, places, strict=True):
        held[place] += size
    fits = all(bytes_ <= budget for bytes_, budget in zip(held, useful, strict=True))
    return tuple(gpus[place] for place in places) if fits else None


def _require_host_memory(parts: Footprint, offloaded: Sequence[int], host_bytes: int | None) -> None:
    needed = sum(parts.waiting[layer] for layer in offloaded)
    if host_bytes is not None and needed > host_bytes:
        raise PlanError(
            f"{len(offloaded)} of {len(parts.layers)} layers would have to be offloaded to host memory and take "
            f"{format_bytes(needed)}; {format_bytes(host_bytes)} is free",
            try_="more free GPU memory, or smaller batches and shorter answers",
        )


_FLOAT = 4
"""Bytes of an element of a Hessian, and of a weight being quantized."""
_SQUARES = 5
"""Matrices as large as a Hessian while it is factored: itself, reversed, its factor, the inverse's, a solver's copy."""
_COLUMNS = 2048
"""Columns of such a matrix that are worked on at a time, held four times over."""
_WEIGHTS = 7
"""Matrices as large as a linear while it is quantized: as it was, what is left of it, codes, values, differences."""


class Needs(NamedTuple):
    """Bytes needed on one GPU."""

    layer: int
    """Weights of a decoder layer."""
    hidden: int
    """Hidden states that stay on the GPU."""
    running: int
    """Peak activations of a batch of samples in the layer."""
    summing: int
    """Hessians being accumulated."""
    factoring: int
    """A Hessian and its factors."""
    solving: int
    """A linear being quantized."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.layer + self.hidden + max(self.running + self.summing, self.factoring, self.solving)


def needs(
    facts: ModelFacts, *, batch: int, tokens: int, hidden: int, lanes: int, number_bytes: int, first: bool
) -> Needs:
    """Bytes that a GPU needs at the most demanding layer.

    batch: samples of `tokens` tokens that go through a layer together. hidden: bytes of hidden states that stay.
    lanes: sums that the GPU makes. number_bytes: of a weight at work. first: the GPU on which sums are added up.
    """
    found = (
        _layer_needs(
            shape, batch=batch, tokens=tokens, hidden=hidden, lanes=lanes, number_bytes=number_bytes, first=first
        )
        for shape in facts.shapes
    )
    return max(found, key=lambda own: own.total)


def _layer_needs(
    shape: LayerShape, *, batch: int, tokens: int, hidden: int, lanes: int, number_bytes: int, first: bool
) -> Needs:
    """`needs` for a layer of this shape."""
    squares = [_FLOAT * linear.inputs**2 for linear in shape.linears]
    widest, count = max(linear.inputs for linear in shape.linears), batch * tokens
    readers = Counter(linear.reads for linear in shape.linears)  # those of one tensor are solved on a GPU each
    mlp = 3 * shape.intermediate + 4 * shape.hidden
    # Scores that a model writes out are there as products, in float32 for the softmax, and after it.
    scores = shape.heads * tokens * (2 * number_bytes + 2 * _FLOAT) if shape.attention == "eager" else 0
    attention = 10 * shape.hidden * number_bytes + scores
    columns = 4 * _FLOAT * widest * _COLUMNS
    return Needs(
        layer=number_bytes * shape.weights,
        hidden=hidden,
        running=count * max(mlp * number_bytes, attention, 3 * _FLOAT * shape.hidden),
        summing=max(squares) * (1 + (lanes - 1).bit_length()) + columns // 4,  # by twos, as in a binary counter
        factoring=_SQUARES * max(squares) + columns if first else 0,
        solving=max(
            (
                2 * _FLOAT * linear.inputs**2 + _WEIGHTS * _FLOAT * linear.weights
                for linear in shape.linears
                if first or readers[linear.reads] > 1
            ),
            default=0,
        ),
    )
