"""What can be said of a key of another program's recipe: settings of ours, and what of it is not honoured?"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from qdist.core.errors import SpecError

Values = Mapping[str, Any]
"""A recipe: keys with their values, those that it leaves to its program's defaults too."""
Kind = Literal["anyhow", "altered", "lost"]
"""anyhow: nothing to set, nothing changes. altered: set, with another meaning. lost: training would differ."""
OFF: tuple[Any, ...] = (None, False, 0, "", "no", "none", "off", "false", [], {})
"""Values by which a feature is not used."""

MICRO, ACCUMULATION, WARMUP_SHARE, EVALS, SAVES, STAGE = (
    "_micro", "_accumulation", "_warmup_share", "_evals", "_saves", "_stage"
)  # fmt: skip
"""What becomes settings only together with other keys: samples, micro-batches, a share of the steps, times an epoch."""


class Remark(NamedTuple):
    """What is not honoured of a key, or not as it was."""

    kind: Kind
    why: str


class Outcome(NamedTuple):
    """What a key comes to."""

    settings: Mapping[str, Any] = {}
    """By dotted key, or by one of the names above."""
    remarks: tuple[Remark, ...] = ()


How = Callable[[Any, Values], Outcome]


class Rule(NamedTuple):
    """What a key is here."""

    how: How
    setting: str = ""
    """The setting of ours that a person who types the key means; empty if there is none."""
    is_same: bool = False
    """Whether that setting takes the same values."""


def same(setting: str) -> Rule:
    """A key for a setting with the same values."""
    return Rule(lambda value, _: Outcome({setting: value}), setting, is_same=True)


def unless_off(setting: str, *, least: float = 0) -> Rule:
    """The same, where numbers up to `least` and false leave it open, as max_steps: -1 does."""

    def how(value: Any, _: Values) -> Outcome:
        return Outcome() if value in OFF or number(value) <= least else Outcome({setting: value})

    return Rule(how, setting, is_same=True)


def among(setting: str, words: Mapping[str, Mapping[str, Any]], *, is_same: bool = False) -> Rule:
    """A key whose values have other names here. words: the settings that each value stands for."""

    def how(value: Any, _: Values) -> Outcome:
        word = str(value).lower()
        if word in words:
            return Outcome(words[word])
        return lost(f"{setting} has nothing for {value!r}, only for {', '.join(words)}")

    return Rule(how, setting, is_same=is_same)


def off(why: str, setting: str = "") -> Rule:
    """A key of a feature that changes training and is not here; it may say that it is not used."""
    return Rule(lambda value, _: Outcome() if value in OFF else lost(why), setting)


def only(values: tuple[Any, ...], why: str) -> Rule:
    """A key that may only have some values: what is done here anyhow. why: what is lost with any other."""
    return Rule(lambda given, _: Outcome() if given in values else lost(why))


def anyhow(why: str, setting: str = "") -> Rule:
    """A key that changes nothing in what is learned."""
    return Rule(lambda _, __: Outcome(remarks=(Remark("anyhow", why),)), setting)


def related(setting: str, how: How) -> Rule:
    """A key for a setting with other values. how: reads them."""
    return Rule(how, setting)


def switched(setting: str, value: Any) -> Rule:
    """A switch that stands for a value of a setting."""
    return related(setting, lambda given, _: Outcome() if given in OFF else Outcome({setting: value}))


def lost(why: str) -> Outcome:
    """An outcome by which training would differ."""
    return Outcome(remarks=(Remark("lost", why),))


def number(value: Any) -> float:
    """A number; YAML reads 2e-4, without a point, as text. Raises SpecError for what is none."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise SpecError(f"{str(value)[:40]!r} is not a number", try_="a number such as 0.0002")
    return found


def whole(value: Any) -> int:
    """A whole number. Raises SpecError for what is none."""
    found = number(value)
    if found != int(found):
        raise SpecError(f"{value!r} is not a whole number", try_=f"{round(found)}")
    return int(found)


def listed(value: Any) -> list[Any]:
    """Several values, from a list or a text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [value]


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Names with values; none for what is left empty. Raises SpecError for anything else."""
    if value in OFF:
        return {}
    if not isinstance(value, Mapping):
        raise SpecError(f"{what} is not a list of names with values", try_=f"{what}: {{NAME: VALUE}}")
    return value


def entries(value: Any, what: str) -> list[Mapping[str, Any]]:
    """Sets of records, each a mapping; one named by its path alone is made so. Raises SpecError for anything else."""
    return [{"path": each} if isinstance(each, str) else mapping(each, f"an entry of {what}") for each in listed(value)]


class Source(NamedTuple):
    """A set of records, as a part of data.path."""

    name: str
    """A file, a folder or a hub id."""
    subset: str = ""
    split: str = ""
    weight: str = ""
    most: str = ""
    """How many records are taken of it."""

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset and self.subset != "default" else ""
        split = f"@{self.split}" if self.split and self.split != "train" else ""
        weight, most = f":{self.weight}" if self.weight else "", f"#{self.most}" if self.most else ""
        return f"{self.name}{subset}{split}{weight}{most}"


def pairs(ours: Mapping[str, Any]) -> list[str]:
    """Columns or roles as OURS=THEIRS, without those that have the same name."""
    return [f"{own}={theirs}" for own, theirs in ours.items() if theirs and own != theirs]
