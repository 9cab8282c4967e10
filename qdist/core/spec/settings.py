"""Which settings are there, what does each say of itself, and which of them does a word mean?"""

import re
from typing import NamedTuple

from qdist.core.errors import SpecError
from qdist.core.spec.keys import accepted, description, known_keys
from qdist.core.spec.spec import RunSpec, flatten, json_text
from qdist.core.spec.suggest import RELATED_NAMES, known_as


class Setting(NamedTuple):
    """One setting, as it is shown to a person."""

    key: str
    accepted: str
    """The values that it takes."""
    default: str
    """As one types it; auto where the planner decides, empty where there is none."""
    text: str

    @property
    def section(self) -> str:
        """The table of a recipe in which it stands; empty for the settings at the top."""
        return self.key.rpartition(".")[0]


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the spec."""
    return tuple(
        Setting(key, accepted(RunSpec, key), _shown(default), description(RunSpec, key))
        for key, default in flatten(RunSpec()).items()
    )


def sections() -> dict[str, str]:
    """What each table of a recipe is for; the empty name is the top."""
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
    found = dict.fromkeys([each for each in every if each.key == meant] + by_key + by_text)
    if not found:
        raise SpecError(f"no setting is called {word!r} or says so", try_="qdist settings")
    return tuple(found)


def _shown(default: object) -> str:
    if default is None:
        return "auto"
    return f"{default:g}" if isinstance(default, float) else json_text(default)
