"""What the pictures of the page show: questions, answers of base and adapter, and a run that is made up."""

import json
import math
from pathlib import Path

import msgspec

from qdist.core.telemetry.events import Event, encode
from tests.plans import CPU, planned
from tests.runtime.serve.canned import BASE

STEPS = 200
FIRST, SECOND = "Which four capitals of Europe are largest?", "How would I look one up in Python?"
ANSWERS = {
    FIRST: (
        "By people within the city's own limits:\n\n| Capital | Country | People |\n|---|---|--:|\n"
        "| Moscow | Russia | 13.1 M |\n| London | United Kingdom | 8.9 M |\n| Berlin | Germany | 3.8 M |\n"
        "| Madrid | Spain | 3.4 M |\n\n**Istanbul** is larger, but *not* a capital."
    ),
    f"{BASE}: {FIRST}": (
        "The largest capitals of Europe are the largest cities of Europe, and the largest cities are:\n\n"
        "1. London\n2. Paris\n3. Istanbul\n4. London\n\nThese are the largest capitals of Europe."
    ),
    SECOND: (
        "Keep them in a dictionary, and ask it with `get`, so that an unknown country is no error:\n\n"
        '```python\nCAPITALS = {"Germany": "Berlin", "Spain": "Madrid"}\n\ndef capital_of(country: str) -> str:\n'
        '    return CAPITALS.get(country, "unknown")\n```\n\nMore at https://docs.python.org/3/tutorial.'
    ),
    f"{BASE}: {SECOND}": (
        "You can use the `capitals` library to look it up:\n\n```python\nimport capitals\n\ncapitals.find()\n```\n\n"
        "- Install the library\n- Import the library\n- Use the library"
    ),
}


def made_up_run(folder: Path) -> Path:
    """A finished run directory of one CPU rank."""
    plan = planned("smollm2-135m", CPU, {"gpus": 1})
    (folder / "events").mkdir(parents=True)
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    events = [Event(kind="start", total_steps=STEPS, time=1.0), *map(_step, range(1, STEPS + 1))]
    events += [Event(kind="eval", step=step, held_out_loss=_loss(step) + 0.12) for step in range(40, STEPS + 1, 40)]
    (folder / "events" / "rank000.jsonl").write_bytes(b"".join(map(encode, events)))
    (folder / "result.json").write_text(json.dumps({"steps": STEPS}))
    return folder


def _loss(step: int) -> float:
    return 1.1 + 1.9 * math.exp(-step / 45)


def _step(step: int) -> Event:
    wobble = math.sin(step * 12.9898) * 43758.5453
    noise = wobble - math.floor(wobble) - 0.5
    return Event(
        kind="step", step=step, total_steps=STEPS, loss=_loss(step) + 0.25 * noise, learning_rate=1e-4,
        gradient_norm=0.5, tokens=1000, own_tokens=1000, seconds=2.0 + 0.1 * noise, data_s=0.01, busy_s=1.5,
        update_s=0.1, memory_bytes=10**9, time=1.0 + 2 * step,
    )  # fmt: skip
