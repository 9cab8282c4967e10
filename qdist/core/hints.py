"""Which change to what was asked makes it work? Each is tried before it is shown."""

from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar

from qdist.core.changes import Change, Say, in_words, typed
from qdist.core.errors import PlanError, QdistError

Made = TypeVar("Made")

_MOST, _MOST_COSTLY = 256, 40
"""Changes that are tried for one refusal, and how many of them may turn out to take too much memory: to find that out
every layout is laid out."""
_WAY = 1
"""What a way costs beside its place: two likely ones, one after the other, come before the fourth out of a refusal."""
_MOST_TOO_BIG = 1
"""Of the ways round a contradiction that end in too little memory, those from which more memory is looked for."""


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
    """A change to be tried. The smallest comes first."""

    memory: int
    """Its place among the ways to fit, which go from small to large; 0 for one that only settles contradictions."""
    cost: int
    """Of all the ways that it takes, the likeliest out of each refusal being the cheapest."""
    number: int
    ways: tuple[Change, ...]
    """Out of one refusal after another; those to fit setting by setting, for not all of them may be needed."""


class _Search(Generic[Made]):
    """Ways out of a refusal, and out of the refusals that they lead to."""

    def __init__(self, attempt: Callable[[Change], Made], now: Mapping[str, Any]) -> None:
        self.attempt = attempt
        self.now = {key: typed(key, value) for key, value in now.items()}
        self.steps: list[_Step] = []
        self.seen = {frozenset[str]()}
        self.too_big = 0
        self.furthest: Change = {}
        """A change that settles all but that it takes too much memory."""

    def smallest(self, error: QdistError) -> tuple[Change, Made] | None:
        """The smallest change that works, and what comes of it; None where none of those tried does."""
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
        """Queue the ways out of a refusal. Those to fit are complete: none is taken after another."""
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
        """Ways as one change, without what is so already."""
        change = {key: value for way in ways for key, value in way.items()}
        return {key: value for key, value in change.items() if typed(key, value) != self.now.get(key)}

    def _without_the_needless(self, ways: tuple[Change, ...], made: Made) -> tuple[Change, Made]:
        """As few of the ways as will do."""
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
