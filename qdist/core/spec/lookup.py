"""Which settings are there, how are they described, and which of them does a word, a flag or a keyword mean?"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qdist.core.errors import SpecError
from qdist.core.spec.keys import accepted, description, json_text, known_keys
from qdist.core.spec.run_spec import RunSpec, flatten, parse_assignment, unknown_key
from qdist.core.spec.suggest import RELATED_NAMES, known_as, meant_by

COMMON = {
    "steps": "steps", "epochs": "epochs", "lr": "optim.lr", "batch_size": "global_batch", "seq_len": "seq_len",
    "lora_r": "lora.r", "seed": "seed",
}  # fmt: skip
"""Flags for the most used settings -> the names of these settings."""
VERBATIM = {"data": "data.path", "eval_data": "data.eval"}
"""Flags for settings whose value is taken as typed, quotes and brackets too: names of files."""


class Setting(NamedTuple):
    """One setting, as shown to the user."""

    key: str
    accepted: str
    """Values that it accepts."""
    default: str
    """Default as typed; auto if the planner decides, empty if there is none."""
    text: str

    @property
    def section(self) -> str:
        """Name of its table in a recipe; empty for top-level settings."""
        return self.key.rpartition(".")[0]


def typed_settings(flags: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """What was typed, by dotted keys. flags: by their names, or by dotted keys; None for those that were not.

    The last --set of a key wins, also over its flag: what an error says to try is typed behind the same command.
    Raises SpecError for what is not a setting.
    """
    own = {VERBATIM.get(name, name): flags[name] for name in flags if flags[name] is not None and name not in COMMON}
    common = [f"{key}={flags[name]}" for name, key in COMMON.items() if flags.get(name) is not None]
    return own | dict(map(parse_assignment, (*common, *assignments)))


def named_settings(named: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, of what a program calls them: 'optim.lr', 'lr', 'lora_r', 'warmup_steps'.

    Raises SpecError, with the nearest that there is, for what no setting or several are called.
    """
    settings = [key for key, section in known_keys(RunSpec).items() if section is None]
    leaves = Counter(key.rpartition(".")[2] for key in settings)
    names = {leaf: key for key in settings if leaves[leaf := key.rpartition(".")[2]] == 1}
    names |= COMMON | VERBATIM | {key: key for key in settings}
    for name in named:
        if name not in names:
            raise unknown_key(name)
    plain = {names[name]: value for name, value in named.items()}
    return {key: str(value) if hasattr(value, "__fspath__") else value for key, value in plain.items()}


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the spec."""
    return tuple(
        Setting(key, accepted(RunSpec, key), _shown(default), description(RunSpec, key))
        for key, default in flatten(RunSpec()).items()
    )


def sections() -> dict[str, str]:
    """Purpose of each table of a recipe, by name; the empty name is the top level."""
    kinds = {"": RunSpec, **{key: kind for key, kind in known_keys(RunSpec).items() if kind is not None}}
    return {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in kinds.items()}


def find_settings(word: str) -> tuple[Setting, ...]:
    """The settings that a word means, then those with a key that has it, then those whose text has it.

    word: a word, the beginning of one, or what another program calls a setting, in any case, with - or _.
    Raises SpecError where there is none.
    """
    every = all_settings()
    asked = word.lower().lstrip("-").replace("-", "_")
    meant = known_as(asked, [each.key for each in every]) or RELATED_NAMES.get(asked)
    by_key = [each for each in every if f"_{asked}".replace(".", "_") in f"_{each.key}".replace(".", "_")]
    by_text = [each for each in every if re.search(rf"(?<!\w){re.escape(word)}", each.text, re.IGNORECASE)]
    by_text += [each for each in every if meant_by(each.key, asked)]
    found = dict.fromkeys([each for each in every if each.key == meant] + by_key + by_text)
    if not found:
        raise SpecError(f"no setting matches {word!r}", try_="qdist settings")
    return tuple(found)


def _shown(default: object) -> str:
    if default is None:
        return "auto"
    return f"{default:g}" if isinstance(default, float) else json_text(default)
