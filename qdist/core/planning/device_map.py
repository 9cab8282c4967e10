"""Where does each module of a planned model lie, in the words of transformers' `device_map`?"""

from typing import NamedTuple

from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Plan


class Modules(NamedTuple):
    """Paths of a model's modules in transformers, in the order of a forward pass."""

    before: tuple[str, ...]
    layers: str
    """The list of decoder layers."""
    behind: tuple[str, ...]


_LLAMA = Modules(("model.embed_tokens", "model.rotary_emb"), "model.layers", ("model.norm", "lm_head"))
_OTHERS = {
    "baichuan": Modules(("model.embed_tokens",), "model.layers", ("model.norm", "lm_head")),
    "bloom": Modules(
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        "transformer.h",
        ("transformer.ln_f", "lm_head"),
    ),
    "gpt_neox": Modules(
        ("gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.rotary_emb"),
        "gpt_neox.layers",
        ("gpt_neox.final_layer_norm", "lm_head"),
    ),
    "opt": Modules(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "model.decoder.layers",
        ("model.decoder.final_layer_norm", "lm_head"),
    ),
}
"""Families that name them otherwise than Llama's does."""


def device_map(plan: Plan) -> dict[str, int | str]:
    """The device of each module for `from_pretrained(..., device_map=...)`, of the first group of GPUs.

    GPUs go by their number, offloaded layers and those of CPU ranks by 'cpu'. Raises SpecError for a sharded backbone.
    """
    if refused := layout_of(plan).unmapped():
        raise refused
    modules = _OTHERS.get(plan.facts.family, _LLAMA)
    gpus = [gpu for rank in plan.ranks if rank.group == 0 for gpu in rank.gpus]
    layer_map = plan.layer_map or (0,) * plan.facts.layer_count
    devices: list[int | str] = [gpus[position] if gpus else "cpu" for position in layer_map]
    found = dict.fromkeys(modules.before, devices[0])
    found |= {
        f"{modules.layers}.{layer}": "cpu" if layer in plan.offloaded_layers else device
        for layer, device in enumerate(devices)
    }
    return found | dict.fromkeys(modules.behind, devices[-1])
