"""What could be typed instead: the setting or value that was meant, the change that works, tried before it is shown."""

import re
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar

from qdist.core.errors import Change, PlanError, QdistError, Say, SpecError, in_words, nearest, typed
from qdist.core.spec.placements import CALLED_ELSEWHERE
from qdist.core.spec.recipes import axolotl, llama_factory, trl
from qdist.core.spec.recipes.rules import Rule
from qdist.core.spec.sections import OPTIMIZERS_ELSEWHERE

__all__ = ["OTHER_NAMES", "RELATED_NAMES", "known_as", "meant_by", "not_among", "of_another_kind", "typed", "unknown"]

_RULES: dict[str, Rule] = {**axolotl.TABLE, **llama_factory.TABLE, **trl.TABLE}
OTHER_NAMES = {
    **{name: rule.setting for name, rule in _RULES.items() if rule.setting and rule.is_same},
    "data": "data.path", "eval_data": "data.eval",
    # Unsloth
    "model_name": "model", "random_state": "seed",
    # what people call CUDA graphs and LoRA+
    "cuda_graphs": "graphs", "cudagraphs": "graphs", "use_cuda_graphs": "graphs", "loraplus": "optim.lr_ratio_b",
    # QLoRA's script, DeepSpeed, and what people say
    "quant_type": "quant.type", "double_quant": "quant.double", "stage": "zero.stage",
    "zero_stage": "zero.stage", "rank": "lora.r", "warmup": "optim.warmup_steps",
}  # fmt: skip
"""Other programs' names for a qdist setting that takes the same values: of their recipes, and of what has none."""
RELATED_NAMES = {
    **{name: rule.setting for name, rule in _RULES.items() if rule.setting and not rule.is_same},
    "tensor_parallel": "placement", "use_gradient_checkpointing": "train.checkpointing",
}  # fmt: skip
"""Other programs' names for a setting whose values differ from qdist's: where to look, not what to type."""

_ELSEWHERE: Mapping[str, Mapping[str, Change]] = {"placement": CALLED_ELSEWHERE, "optim.name": OPTIMIZERS_ELSEWHERE}
"""Other tools' names for a value of a setting, with the change meant."""


def unknown(key: str, settings: Sequence[str], value: Any = None) -> SpecError:
    """The error for a setting that does not exist, naming the nearest that does. value: what it was to be set to."""
    by_leaf, leaf, message = _by_leaf(settings), key.rpartition(".")[2], f"unknown setting {key!r}"
    guess = known_as(key, settings)
    if guess is None and leaf in RELATED_NAMES:
        meant = meant_by(RELATED_NAMES[leaf], value)
        return SpecError(message, try_="" if meant else f"qdist settings {leaf}", ways=[meant] if meant else [])
    guess = guess or nearest(key, settings) or by_leaf.get(nearest(leaf, by_leaf) or "")
    if guess and value is not None:
        return SpecError(message, ways=[{guess: value}])
    return SpecError(message, try_=guess or "a setting that `qdist launch --help` lists")


def known_as(name: str, settings: Sequence[str]) -> str | None:
    """The setting with the same last part as `name`, or with that name in other programs; None if there is none."""
    leaf = name.rpartition(".")[2]
    return _by_leaf(settings).get(leaf) or OTHER_NAMES.get(leaf)


def meant_by(key: str, value: Any) -> Change | None:
    """The change that another program's value of a setting stands for, or None: 'adamw_8bit' of optim.name."""
    return _ELSEWHERE.get(key, {}).get(str(value).lower().replace("-", "_"))


def _by_leaf(settings: Sequence[str]) -> dict[str, str]:
    return {name.rpartition(".")[2]: name for name in settings}


def not_among(key: str, value: Any, choices: Sequence[str], usual: str = "") -> SpecError:
    """The error for a value that is none of the few that there are. usual: the one to try where none is near."""
    usual = usual or (choices[0] if choices[1:] else "auto")
    among = f"one of {', '.join(choices)}" if choices[1:] else f"{choices[0]} or {usual}"
    guess = nearest(str(value), choices) or usual
    return SpecError(
        f"{key} cannot be {value!r}: it is {among}",
        ways=[meant_by(key, value) or {key: guess}, {key: usual}],
    )


def of_another_kind(key: str, value: Any, reason: str, usual: Change) -> SpecError:
    """The error for a number out of its range, or what is not a number.

    reason: msgspec's.
    usual: what may be typed instead, if there is such.
    """
    # What was got shows already, and as a flag's or recipe's text it is a `str` whatever it looks like.
    wanted = reason.partition(", got ")[0].replace(" | null", "")
    for kind, words in (
        ("`int`", "a whole number"),
        ("`float`", "a number"),
        ("`bool`", "true or false"),
        ("`str`", "text"),
        ("`array` of length >= 1", "one or more names"),
        ("`array`", "a list of names"),
    ):
        wanted = wanted.replace(kind, words)
    wanted = re.sub(r"([<>]=? -?\d+)\.0$", r"\1", wanted)
    wanted = re.sub(r" number >= ([\d.]+)$", r" number, \1 or more", wanted)
    return SpecError(
        f"{key} cannot be {value!r}: {wanted[:1].lower()}{wanted[1:]}",
        try_="" if usual else f"another value for {key}",
        ways=[usual] if usual else [],
    )


Made = TypeVar("Made")

_MOST, _MOST_COSTLY = 256, 40
"""Changes that are tried for one refusal, and how many of them may turn out to take too much memory: to find that out
every layout is laid out."""
_WAY = 1
"""Cost of a way besides its place: two likely ones in a row are tried before the fourth way out of one refusal."""
_MOST_TOO_BIG = 1
"""Ways round a contradiction that run out of memory and are still searched for ways to fit."""


class TooBigError(PlanError):
    """Memory is short in every layout. `ways` go from small to large, and one of them is taken."""


def or_tried_hint(
    attempt: Callable[[Change], Made],
    now: Mapping[str, Any],
    *,
    say: Say = in_words,
    remark: Callable[[Made], str] = lambda _: "",
) -> Made:
    """What was asked; where it is refused, the refusal names the smallest change with which it is not.

    attempt: what was asked, with a change to it.
    now: what is set, by dotted key: a change to what it is already is none.
    say: a change in words. remark: what is said of what came of it, where memory was short.
    """
    try:
        return attempt({})
    except QdistError as error:
        if error.ways:
            search = _Search(attempt, now)
            if found := search.smallest(error):
                change, made = found
                about = remark(made) if isinstance(error, TooBigError) else ""
                error.try_ = say(change) + (f" ({about})" if about else "")
            elif isinstance(error, TooBigError):
                error.try_ = "a smaller model, or larger GPUs"
            else:
                error.try_ = say(search.furthest or error.ways[0])
        raise


class _Step(NamedTuple):
    """A change to try. The smallest comes first."""

    memory: int
    """Its place among the ways to fit, from small to large; 0 for one that only resolves contradictions."""
    cost: int
    """Summed cost of the ways taken; the likeliest way out of each refusal is the cheapest."""
    number: int
    ways: tuple[Change, ...]
    """Ways out of successive refusals; ways to fit are split by setting, since not all may be needed."""


class _Search(Generic[Made]):
    """Ways out of a refusal, and out of the refusals that they lead to."""

    def __init__(self, attempt: Callable[[Change], Made], now: Mapping[str, Any]) -> None:
        self.attempt = attempt
        self.now = {key: typed(key, value) for key, value in now.items()}
        self.steps: list[_Step] = []
        self.seen = {frozenset[str]()}
        self.too_big = 0
        self.furthest: Change = {}
        """A change that resolves everything except too little memory."""

    def smallest(self, error: QdistError) -> tuple[Change, Made] | None:
        """The smallest change that works, and its result; None if none of those tried does."""
        self._open(error, _Step(0, 0, 0, ()))
        for _ in range(_MOST):
            if not self.steps or self.too_big > _MOST_COSTLY:
                return None
            step = heappop(self.steps)
            try:
                made = self.attempt(self._together(step.ways))
            except QdistError as next_error:
                self._open(next_error, step)
                continue
            return self._without_the_needless(step.ways, made)
        return None

    def _open(self, error: QdistError, step: _Step) -> None:
        """Queue the ways out of a refusal. Ways to fit are complete: none is combined with another."""
        short_of_memory = isinstance(error, TooBigError)
        if short_of_memory:
            self.furthest = self.furthest or self._together(step.ways)
            self.too_big += 1
            if step.memory or self.too_big > _MOST_TOO_BIG:
                return
        for place, way in enumerate(error.ways, start=1):
            ways = (*step.ways, *({key: value} for key, value in way.items())) if short_of_memory else (*step.ways, way)
            words = frozenset(typed(key, value) for key, value in self._together(ways).items())
            if words not in self.seen:
                self.seen.add(words)
                memory = place if short_of_memory else step.memory
                heappush(self.steps, _Step(memory, step.cost + _WAY + place, len(self.seen), ways))

    def _together(self, ways: tuple[Change, ...]) -> Change:
        """Ways as one change, without what is already set."""
        change = {key: value for way in ways for key, value in way.items()}
        return {key: value for key, value in change.items() if typed(key, value) != self.now.get(key)}

    def _without_the_needless(self, ways: tuple[Change, ...], made: Made) -> tuple[Change, Made]:
        """As few of the ways as suffice."""
        for way in ways:
            fewer = tuple(other for other in ways if other is not way)
            less = self._together(fewer)
            if not less or less == self._together(ways):
                continue
            try:
                made = self.attempt(less)
            except QdistError:
                continue
            ways = fewer
        return self._together(ways), made
