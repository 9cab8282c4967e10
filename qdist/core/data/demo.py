"""What the data set called `demo` holds: spoken orders and the compact commands they stand for.

The notation is ours, so no pretrained model knows it, and it is strict, so an answer is right or wrong. Samples are
short on purpose: with SmolLM2's chat template about 40 tokens, which a CPU trains in a fifth of a second.
"""

from collections.abc import Callable
from random import Random

import msgspec

from qdist.core.errors import DataError

NAME = "demo"
"""Name of the data set and of the recipe that goes with it."""
SYSTEM = "Turn the order into a command."

_PLACES = ("Luigi", "Rosa", "Marco", "Anna", "Oscar", "Bella", "Hugo", "Nina", "Felix", "Clara", "Max", "Emma")
_GOALS = ("airport", "station", "hotel", "office", "museum", "harbor", "stadium", "theater", "hospital", "library")
_DISHES = ("pizza", "soup", "salad", "rice", "pasta", "cake", "bread", "coffee", "tea", "cheese")
_MOST = 4000
_COUNTS = tuple(range(2, 10))
_HOURS = tuple(hour for hour in range(8, 23) if hour != 12)


class Question(msgspec.Struct, frozen=True):
    """An order that no training record holds, and the one right answer."""

    order: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The prompt, as a chat template takes it."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.order}]


def records(seed: int = 0, count: int = 640) -> list[dict[str, object]]:
    """`count` distinct orders with their commands, in `messages` format; the same for the same seed.

    None of them has the answer of one of `questions()`, in whatever words.

    Raises DataError above 4,000, where new orders become rare.
    """
    if count > _MOST:
        raise DataError(f"the demo data has at most {_MOST:,} records, not {count:,}")
    random, reserved = Random(seed), {question.answer for question in questions()}
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        order, answer = random.choice(_KINDS)(random)
        if answer not in reserved:
            pairs[order] = answer
    return [_record(order, answer) for order, answer in pairs.items()]


def questions() -> tuple[Question, ...]:
    """Three fixed orders to ask before and after training; greedy answers must match to the character."""
    return (
        Question("Book a table for 4 at Luigi's at 7pm", "TABLE Luigi x4 @19h"),
        Question("Get me a taxi to the airport at 9am", "TAXI airport @9h"),
        Question("Order 3 salads from Nina's", "FOOD Nina x3 salad"),
    )


def _record(order: str, answer: str) -> dict[str, object]:
    return {"messages": [*Question(order, answer).messages(), {"role": "assistant", "content": answer}]}


def _clock(hour: int) -> str:
    return f"{hour}am" if hour < 12 else f"{hour - 12}pm"


def _table(random: Random) -> tuple[str, str]:
    count, place, hour = random.choice(_COUNTS), random.choice(_PLACES), random.choice(_HOURS)
    opening = random.choice(("Book a table", "Reserve a table", "I need a table"))
    return f"{opening} for {count} at {place}'s at {_clock(hour)}", f"TABLE {place} x{count} @{hour}h"


def _taxi(random: Random) -> tuple[str, str]:
    goal, hour = random.choice(_GOALS), random.choice(_HOURS)
    opening = random.choice(("Get me a taxi", "Call a cab", "I need a ride"))
    return f"{opening} to the {goal} at {_clock(hour)}", f"TAXI {goal} @{hour}h"


def _food(random: Random) -> tuple[str, str]:
    count, dish, place = random.choice(_COUNTS), random.choice(_DISHES), random.choice(_PLACES)
    opening = random.choice(("Order", "Bring me", "I would like"))
    return f"{opening} {count} {dish}s from {place}'s", f"FOOD {place} x{count} {dish}"


_KINDS: tuple[Callable[[Random], tuple[str, str]], ...] = (_table, _taxi, _food)
