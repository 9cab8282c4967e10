"""Which model is meant by a name: an alias, a hub id, or that of a model made from a known one?"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from qdist.core.errors import ModelError, nearest
from qdist.core.model.families import FAMILIES
from qdist.core.model.families.family import Alias, Config

ALIASES = {name: alias for family in FAMILIES.values() for name, alias in family.aliases.items()}
"""Each known model by its short name; they stand in the files of their families."""


def lookup(name: str) -> Alias:
    """The model of an alias or hub id, in any case, with or without a dash before the digits.

    Raises ModelError, naming the nearest alias.
    """
    wanted = folded(name)
    for alias, model in ALIASES.items():
        hub_id = folded(model.hub_id)
        if wanted and wanted in (folded(alias), hub_id, hub_id.rpartition("/")[2]):
            return model
    close = nearest(name.rpartition("/")[2], ALIASES)
    raise ModelError(f"no model is called {name!r}", try_=close or "a folder, a Hub id, or a name of qdist models")


def config_of(name: str) -> Config:
    """A copy of a known model's config, for `AutoConfig.for_model(**config)` and `from_config`.

    Raises ModelError as `lookup` does.
    """
    return {key: dict(value) if isinstance(value, dict) else value for key, value in lookup(name).config.items()}


def folded(name: str) -> str:
    """'Llama-2-7B', 'llama2_7b' and 'llama2-7b' read alike."""
    return re.sub(r"(?<=[a-z])-(?=\d)", "", name.strip().lower().replace("_", "-").replace(" ", "-"))


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
    """Words of a name without its owner, except those that say how weights are stored."""
    words = re.split(r"[-_ ]", name.rpartition("/")[2].lower())
    return [word for word in words if not re.fullmatch(_STORED, word)]


def _untuned(words: Iterable[str], model: Alias) -> str:
    return folded("-".join(word for word in words if word not in model.tuned))
