"""What is a model made of? The shapes of its layers, and what can be counted from them."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import msgspec

from qdist.core.errors import ModelError, nearest

MOST_UNPACKED = 0.01
"""Largest share of linears and experts that may be in 16 bits where fewer were asked for."""
UNPACKED_EXPERTS = "experts in a layout that is not packed"
"""Reason for experts that are not one matrix an expert in parameters of one module."""

Reads = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]
"""Which tensor of a decoder layer a linear takes as input."""
ALL_LINEAR = "all-linear"  # stands for every name in `linear_names`, as in peft
EXPERTS = "experts"
"""Target that stands for every matrix of every expert, which `all-linear` does not contain, as in peft."""


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear module of a decoder layer, by its leaf name in transformers; or one matrix of an expert."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    reads: Reads
    """Linears that read the same tensor share it when autograd keeps it."""
    within: str = ""
    """Path in the layer of the module that has it, such as 'mlp.shared_expert'; empty where the name alone tells."""
    transposed: bool = False
    """Whether transformers' class holds the matrix as [inputs, outputs]: a `Conv1D`, as in GPT-2."""

    @property
    def weights(self) -> int:
        """Elements of the matrix, which is quantized."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Parameters of matrix and bias."""
        return self.weights + self.outputs * self.bias


class Experts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The routed experts of a decoder layer: 3-D parameters of one matrix an expert, which are quantized."""

    path: str
    """Path in the layer of the module that has the parameters, such as 'mlp.experts'."""
    count: int
    active: int
    """Experts that a token visits."""
    matrices: tuple[Linear, ...]
    """The matrices of one expert by the names of the parameters: [count, outputs, inputs], biases [count, outputs]."""
    transposed: bool = False
    """Whether the parameters are [count, inputs, outputs] instead."""

    @property
    def weights(self) -> int:
        """Elements of all matrices, which are quantized."""
        return self.count * sum(matrix.weights for matrix in self.matrices)

    @property
    def parameters(self) -> int:
        """Parameters of all matrices and biases."""
        return self.count * sum(matrix.parameters for matrix in self.matrices)


_MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "experts")
"""What users name for the matrices of an MLP."""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module of a decoder layer that stays in 16 or 32 bits and is not adapted, with the reason."""

    path: str
    """Path in the layer."""
    parameters: int
    reason: str
    """A phrase such as 'router', or 'read by a fused kernel'."""


class LayerShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of one decoder layer. Counts are parameters, never bytes."""

    hidden: int
    """Width of the layer's input and output."""
    linears: tuple[Linear, ...]
    """Linears in module order, which are quantized and adapted."""
    intermediate: int
    """Width of the MLP."""
    heads: int
    """Query heads; 0, like the next two fields, in a layer without attention."""
    kv_heads: int
    head_dim: int
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    """Norms over the hidden size."""
    qk_norm: bool | Literal["whole"] = False
    """Queries and keys each pass a norm: True for one over each head, 'whole' for one over all heads."""
    mlp: Literal["gated", "gelu", "relu"] = "gated"
    """activation(gate) * up, or the activation of up alone."""
    attention: Literal["flash", "repacked", "joined", "eager"] = "flash"
    """repacked: rotating part of a head lays queries out anew, so the output is copied before it is projected.
    joined: so does the class, but not Liger's rotation, which takes its place where layers are fused.
    eager: the model writes out its scores (ALiBi), and no flash kernel runs."""
    experts: Experts | None = None
    kept: tuple[Kept, ...] = ()
    """Modules and parameters besides linears, experts and norms: routers, convolutions, decays, small gates."""
    mixer: Literal["attention", "recurrent", "none"] = "attention"
    """What mixes tokens. recurrent: Gated DeltaNet, Mamba and the like, whose state is as long as the layer is wide."""

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of the linears and the experts."""
        return sum(linear.parameters for linear in self.linears) + (self.experts.parameters if self.experts else 0)

    @property
    def kept_parameters(self) -> int:
        """Parameters of what is kept in 16 or 32 bits, norms aside."""
        return sum(kept.parameters for kept in self.kept)

    @property
    def norm_parameters(self) -> int:
        """Parameters of all norms."""
        return self.norms * self.norm_width + sum(self.qk_norm_widths)

    @property
    def qk_norm_widths(self) -> tuple[int, ...]:
        """Parameters of the norms of queries and of keys; empty if there are none."""
        if not self.qk_norm:
            return ()
        heads = (self.heads, self.kv_heads) if self.qk_norm == "whole" else (1, 1)
        return tuple(count * self.head_dim for count in heads)

    @property
    def norm_width(self) -> int:
        """Parameters of a norm over the hidden size: a layer norm has a scale and a shift, an RMS norm a scale."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def parameters(self) -> int:
        """Parameters of the whole layer."""
        return self.linear_parameters + self.norm_parameters + self.kept_parameters

    @property
    def weights(self) -> int:
        """Elements of all matrices, which are quantized."""
        return sum(linear.weights for linear in self.linears) + (self.experts.weights if self.experts else 0)

    @property
    def active_weights(self) -> int:
        """Those of them that a token passes: of experts the ones that it visits."""
        idle = (
            (self.experts.count - self.experts.active) * self.experts.weights // self.experts.count
            if self.experts
            else 0
        )
        return self.weights - idle

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix; 0 in a layer without linears."""
        return max((linear.weights for linear in self.linears), default=0)

    @property
    def output_gate(self) -> bool:
        """Whether the query projection is twice as wide, for a gate on attention's output."""
        readers = [linear for linear in self.linears if linear.reads == "attention_in"]
        return len(readers) > 2 and readers[0].outputs == 2 * self.heads * self.head_dim > 0

    @property
    def inner(self) -> int:
        """Width of the MLPs that are linears, shared experts among them: what their last linears read."""
        return sum(linear.inputs for linear in self.linears if linear.reads == "mlp_out")

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears that `targets` names; `all-linear` names every one. Experts are no linears."""
        return tuple(linear for linear in self.linears if ALL_LINEAR in targets or linear.name in targets)

    def targeted_matrices(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The matrices of an expert that `targets` names: `experts` every one, `experts.down_proj` that one."""
        matrices = self.experts.matrices if self.experts else ()
        return tuple(each for each in matrices if EXPERTS in targets or f"{EXPERTS}.{each.name}" in targets)

    def linear_at(self, path: str) -> Linear | None:
        """The one of `linears`, which are quantized, that is at a path in the layer."""
        within, _, leaf = path.rpartition(".")
        found = (linear for linear in self.linears if linear.name == leaf and linear.within in ("", within))
        return next(found, None)

    def matrix_at(self, path: str) -> Linear | None:
        """The matrix of an expert whose parameter is at a path in the layer."""
        within, _, leaf = path.rpartition(".")
        matrices = self.experts.matrices if self.experts and self.experts.path == within else ()
        return next((matrix for matrix in matrices if matrix.name == leaf), None)

    def kept_at(self, path: str) -> Kept | None:
        """What of `kept` is, or has, the module or parameter at a path in the layer."""
        return next((kept for kept in self.kept if f"{path}.".startswith(f"{kept.path}.")), None)

    def packs(self, path: str) -> bool:
        """Whether the linear at a path in the layer is one of `linears`, which are quantized."""
        return self.linear_at(path) is not None


class Modules(NamedTuple):
    """Paths of modules in transformers' class, by what they do in a forward pass. Llama's, unless a family differs."""

    embedding: str = "model.embed_tokens"
    before: tuple[str, ...] = ()
    """Modules that hidden states pass between the embedding and the first layer."""
    added: tuple[str, ...] = ()
    """Modules whose output is added to the embedding, such as learned positions."""
    shared: tuple[str, ...] = ("model.rotary_emb",)
    """Modules whose output every layer gets, so that every stage of a split computes it."""
    layers: str = "model.layers"
    """The list of decoder layers."""
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def until_layers(self) -> tuple[str, ...]:
        """Everything that runs before the first layer, in order."""
        return (self.embedding, *self.before, *self.added, *self.shared)

    @property
    def tables(self) -> tuple[str, str]:
        """Leaf names of the input and output embeddings."""
        return self.embedding.rpartition(".")[2], self.head.rpartition(".")[2]


class LayerRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number of consecutive decoder layers of one shape."""

    shape: LayerShape
    count: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a causal language model. Counts are parameters, never bytes."""

    name: str
    family: str
    """The `model_type` of the config."""
    layers: tuple[LayerRun, ...]
    """The decoder layers in order, run-length coded."""
    vocab: int
    max_positions: int
    tied_embeddings: bool
    """Whether the output head is the input embedding: one matrix, counted once."""
    outer_norms: int = 1
    """Norms over the hidden size outside the decoder layers, of the kind that these have."""
    learned_positions: int = 0
    """Rows of a learned position table (OPT), or 0."""
    modules: Modules = Modules()
    together_from: int | None = None
    """First of the decoder layers that must lie in one stage, as later ones read keys and values of earlier ones."""
    outer_parameters: int = 0
    """Parameters outside the decoder layers besides embeddings, norms and head, kept in 16 or 32 bits."""
    left_out: tuple[Kept, ...] = ()
    """Towers of the whole model that are not loaded for training on text, such as 'model.vision_tower'."""
    measured: bool = True
    """Whether activations of the family were measured; otherwise its plan has a margin."""
    unsplit: str = ""
    """Why the decoder cannot be cut into stages, to follow 'the model'; empty if it can."""

    def layer_at(self, path: str) -> tuple[int, str] | None:
        """The decoder layer that a module path is in, and the path in it; None for other modules."""
        layer, _, inner = path.removeprefix(f"{self.modules.layers}.").partition(".")
        inside = path.startswith(f"{self.modules.layers}.") and layer.isdecimal()
        return (int(layer), inner) if inside else None

    def packs(self, path: str) -> bool:
        """Whether the linear at a module path is quantized: one of its decoder layer's `linears`."""
        found = self.layer_at(path)
        return found is not None and self.shapes[self.run_of_layer[found[0]]].packs(found[1])

    @property
    def experts(self) -> dict[str, Experts]:
        """The experts of the layers that have any, by the paths of their modules."""
        found = (self.shapes[run].experts for run in self.run_of_layer)
        return {f"{self.modules.layers}.{index}.{each.path}": each for index, each in enumerate(found) if each}

    def targeted_parameters(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Paths in a layer of the parameters of experts that `targets` names, for PEFT's `target_parameters`."""
        found = ((shape.experts, shape.targeted_matrices(targets)) for shape in self.shapes)
        names = (f"{experts.path}.{matrix.name}" for experts, matrices in found if experts for matrix in matrices)
        return tuple(dict.fromkeys(names))

    @property
    def hidden(self) -> int:
        """Width of hidden states, the same between all layers."""
        return self.layers[0].shape.hidden

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return sum(run.count for run in self.layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The shape of each run."""
        return tuple(run.shape for run in self.layers)

    @property
    def run_of_layer(self) -> tuple[int, ...]:
        """The run of each decoder layer, by its number in `layers`."""
        return tuple(index for index, run in enumerate(self.layers) for _ in range(run.count))

    def counts(self, first: int, number: int) -> tuple[int, ...]:
        """Number of layers of each run among `number` layers from `first` on."""
        ends = tuple(accumulate((run.count for run in self.layers), initial=0))
        return tuple(max(0, min(end, first + number) - max(start, first)) for start, end in pairwise(ends))

    def runs(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Number of layers of each run among those given by their numbers."""
        run_of_layer = self.run_of_layer if layers else ()
        found = [run_of_layer[layer] for layer in layers]
        return tuple(found.count(run) for run in range(len(self.layers)))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of every kind of decoder layer, each once. lm_head is none."""
        return tuple(dict.fromkeys(linear for shape in self.shapes for linear in shape.linears))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of linears that `targets` may contain."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Everything that `targets` may contain besides `all-linear`: linears, then experts."""
        experts = [shape.experts for shape in self.shapes if shape.experts]
        matrices = (f"{EXPERTS}.{matrix.name}" for own in experts for matrix in own.matrices)
        return (*self.linear_names, *dict.fromkeys((*([EXPERTS] if experts else []), *matrices)))

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        return sum(run.count * run.shape.experts.parameters for run in self.layers if run.shape.experts)

    @property
    def linear_weights(self) -> int:
        """Elements of all matrices in decoder layers, which are quantized."""
        return sum(run.count * run.shape.weights for run in self.layers)

    @property
    def active_weights(self) -> int:
        """Those of them that a token passes: of experts the ones that it visits."""
        return sum(run.count * run.shape.active_weights for run in self.layers)

    @property
    def outer_norm_parameters(self) -> int:
        """Parameters of all norms outside the decoder layers."""
        return self.outer_norms * self.layers[0].shape.norm_width

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token table, the position table if learned, and the output head unless tied."""
        tables = 1 if self.tied_embeddings else 2
        return (tables * self.vocab + self.learned_positions) * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        layers = sum(run.count * run.shape.parameters for run in self.layers)
        return layers + self.outer_norm_parameters + self.embedding_parameters + self.outer_parameters

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """Every linear of every kind of layer that `targets` names, each once; `all-linear` names every one.

        Raises ModelError when a target is neither a linear of this model nor experts of it.
        """
        self.require_targets(targets)
        return tuple(dict.fromkeys(linear for shape in self.shapes for linear in shape.targeted(targets)))

    def require_targets(self, targets: tuple[str, ...]) -> None:
        """Raise ModelError naming the first target that this model does not have, or that is kept as it is."""
        known = self.target_names
        strangers = [name for name in targets if name != ALL_LINEAR and name not in known]
        if not strangers:
            return
        meant = dict.fromkeys(filter(None, (_meant_target(each, known) for each in targets)))
        raise ModelError(self._why_not(strangers[0], known), ways=[{"lora.targets": tuple(meant) or (ALL_LINEAR,)}])

    def _why_not(self, target: str, known: tuple[str, ...]) -> str:
        """Why a target cannot be adapted."""
        kept = [own for shape in self.shapes for own in shape.kept if target in (own.path, own.path.rpartition(".")[2])]
        if kept:
            return f"{target} of {self.name} is not adapted: {kept[0].reason}"
        if target.partition(".")[0] == EXPERTS and EXPERTS not in known:
            return f"{self.name} has no experts, which lora.targets names"
        return f"{self.name} has no linear {target!r} among {', '.join(known)}"


def _meant_target(target: str, known: tuple[str, ...]) -> str | None:
    """The target of a model that is most likely meant: matrices of an MLP are those of its experts, if it has them."""
    if target == ALL_LINEAR or target in known:
        return target
    is_mlp = target.rpartition(".")[2] in _MLP_NAMES
    return EXPERTS if is_mlp and EXPERTS in known else nearest(target, known)
