"""What is a model made of? The shapes of its layers, and what can be counted from them."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import msgspec

from qdist.core.errors import ModelError, nearest

Reads = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]
"""Which tensor of a decoder layer a linear takes as input."""
ALL_LINEAR = "all-linear"  # stands for every name in `linear_names`, as in peft


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear module of a decoder layer, by its leaf name in transformers."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    reads: Reads
    """Linears that read the same tensor share it when autograd keeps it."""

    @property
    def weights(self) -> int:
        """Elements of the matrix, which is quantized."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Parameters of matrix and bias."""
        return self.weights + self.outputs * self.bias


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
    attention: Literal["flash", "repacked", "eager"] = "flash"
    """repacked: rotating part of a head lays queries out anew, so the output is copied before it is projected.
    eager: the model writes out its scores (ALiBi), and no flash kernel runs."""

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of the linears."""
        return sum(linear.parameters for linear in self.linears)

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
        return self.linear_parameters + self.norm_parameters

    @property
    def weights(self) -> int:
        """Elements of all matrices, which are quantized."""
        return sum(linear.weights for linear in self.linears)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix."""
        return max(linear.weights for linear in self.linears)

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears that `targets` names; `all-linear` names every one."""
        return tuple(linear for linear in self.linears if ALL_LINEAR in targets or linear.name in targets)


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
        """Names that `targets` may contain."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def linear_weights(self) -> int:
        """Elements of all matrices in decoder layers, which are quantized."""
        return sum(run.count * run.shape.weights for run in self.layers)

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
        return layers + self.outer_norm_parameters + self.embedding_parameters

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """Every linear of every kind of layer that `targets` names, each once; `all-linear` names every one.

        Raises ModelError when a target is not a linear of this model.
        """
        strangers = [] if ALL_LINEAR in targets else [name for name in targets if name not in self.linear_names]
        if strangers:
            known = ", ".join(self.linear_names)
            meant = dict.fromkeys(filter(None, (nearest(each, self.linear_names) for each in targets)))
            raise ModelError(
                f"{self.name} has no linear {strangers[0]!r} among {known}",
                ways=[{"lora.targets": tuple(meant) or (ALL_LINEAR,)}],
            )
        return tuple(dict.fromkeys(linear for shape in self.shapes for linear in shape.targeted(targets)))
