"""A stage of a split backbone: the same model without the parts that other ranks hold."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qdist.core.errors import PlanError
from qdist.core.plan import Plan
from qdist.runtime.methods.skeleton import decoder_layers

FINAL_NORMS = ("norm", "final_layer_norm", "ln_f")
_TUPLES = ("BloomBlock",)
"""Decoder layers whose output is the first of a tuple."""


class Absent(nn.Module):
    """Where a part was that another rank holds: no parameters, and what comes in goes out."""

    def __init__(self, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self.as_tuple else hidden


class _NoPositions(nn.Module):
    """In place of OPT's position embedding, which is added by the first stage: nothing to add."""

    def forward(self, mask: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros((), device=mask.device)


def keep_stage(model: Any, layers: range, *, first: bool, last: bool) -> None:
    """Take out of a causal language model what this stage does not own, in place, with or without weights in it.

    Kept modules keep their names (model.layers.37...), and so do adapters and checkpoints. The first stage embeds,
    the last one has the final norm and the head; a head that is tied to the embedding keeps that table.
    Other stages are given hidden states as `inputs_embeds` of the decoder.
    """
    decoder, stack = model.get_decoder(), decoder_layers(model)
    as_tuple = type(stack[0]).__name__ in _TUPLES
    for index in range(len(stack)):
        if index not in layers:
            stack[index] = Absent(as_tuple=as_tuple)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is table.weight
    if not last:
        _without_end(decoder)
        model.set_output_embeddings(Absent())
    if not first:
        _without_beginning(decoder)
        if not (last and tied):
            decoder.set_input_embeddings(Absent())
    if tied and not last:
        # There is one of the two here, and nothing to tie it to.
        model.config.tie_word_embeddings = False
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}


def arrange_stage(plan: Plan, rank: int) -> Any:
    """What `load_backbone` takes as `arrange` for a rank of a split plan whose ranks are stages.

    Raises PlanError for a plan with new vocabulary rows: first and last stage would each train some of them.
    """
    if plan.source.new_token_ids:
        raise PlanError(
            f"split cannot train {len(plan.source.new_token_ids)} new row(s) of the vocabulary",
            try_="--placement shard, or a tokenizer that needs no new tokens",
        )
    position = plan.ranks[rank].position
    layers = layers_of(plan, position)

    def arrange(model: Any) -> None:
        keep_stage(model, layers, first=position == 0, last=position == plan.gpus_per_group - 1)

    return arrange


def layers_of(plan: Plan, position: int) -> range:
    """The decoder layers of a position. Raises PlanError when the layer map gives it none, or not one after another."""
    layers = [layer for layer, owner in enumerate(plan.layer_map) if owner == position]
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise PlanError(
            f"position {position} of {plan.gpus_per_group} has layers {layers}", try_="one run of layers for each GPU"
        )
    return range(layers[0], layers[-1] + 1)


@contextlib.contextmanager
def only_present(model: Any) -> Iterator[None]:
    """For code that patches every layer and the final norm of a model (Liger): absent parts are out of its sight.

    Absent layers leave the list meanwhile, and an absent final norm that was patched is made anew.
    """
    decoder, stack = model.get_decoder(), decoder_layers(model)
    everything = dict(stack._modules)
    for key, layer in everything.items():
        if isinstance(layer, Absent):
            del stack._modules[key]
    absent = [name for name in FINAL_NORMS if isinstance(getattr(decoder, name, None), Absent)]
    try:
        yield
    finally:
        kept = dict(stack._modules)
        stack._modules.clear()
        stack._modules.update({key: kept.get(key, layer) for key, layer in everything.items()})
        for name in absent:
            setattr(decoder, name, Absent())


def _without_end(decoder: Any) -> None:
    for name in FINAL_NORMS:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, Absent())
    if getattr(decoder, "project_out", None) is not None:  # OPT
        decoder.project_out = None


def _without_beginning(decoder: Any) -> None:
    """What older families do between the embedding and the first layer."""
    if hasattr(decoder, "word_embeddings_layernorm"):  # BLOOM
        decoder.word_embeddings_layernorm = Absent()
    if hasattr(decoder, "emb_dropout"):  # GPT-NeoX
        decoder.emb_dropout = Absent()
    if hasattr(decoder, "embed_positions"):  # OPT
        decoder.embed_positions = _NoPositions()
    if getattr(decoder, "project_in", None) is not None:  # OPT
        decoder.project_in = None
