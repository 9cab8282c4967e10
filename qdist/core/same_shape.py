"""Which alias' shape does a model on the hub have, by its name?"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from qdist.core.models import ALIASES, Alias, Config, config_of, folded

_STORED = r"gguf|gptq|awq|bnb|exl2|unsloth|meta|[2-8]-?bits?|int[48]|bf16|fp16|\d+g"
"""Words of a name that leave a model's shape as it is; 'meta' is in front of some Llamas' names."""


class SameShape(NamedTuple):
    """The shape that a model has by its name."""

    alias: str
    config: Config


def same_shape(hub_id: str) -> SameShape | None:
    """The shape of a hub id by its name: an alias' own, or that of what was made from it; None where no name tells.

    `Qwen/Qwen2.5-7B-Instruct` and `unsloth/Qwen2.5-7B-bnb-4bit` have the shape of qwen2.5-7b. Words that say how a
    model was tuned count where its alias knows them, words that say how its weights are stored anywhere; any other word
    makes it another model: Qwen2-7B, Qwen2.5-Coder-7B, Llama-3.1-Nemotron-8B.
    """
    words = _words(hub_id)
    for alias, model in ALIASES.items():
        names = (model.hub_id or alias, *model.also)
        if _untuned(words, model) in {_untuned(_words(name), model) for name in names}:
            changes = {key: value for word in words for key, value in model.tuned.get(word, {}).items()}
            return SameShape(alias, config_of(alias) | changes)
    return None


def _words(name: str) -> list[str]:
    """Of a name without its owner; those that say how weights are stored are left out."""
    words = re.split(r"[-_ ]", name.rpartition("/")[2].lower())
    return [word for word in words if not re.fullmatch(_STORED, word)]


def _untuned(words: Iterable[str], model: Alias) -> str:
    return folded("-".join(word for word in words if word not in model.tuned))
