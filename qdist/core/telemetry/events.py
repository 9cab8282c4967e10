"""What a running rank logs each step, and how its lines are read back."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from statistics import median
from typing import Annotated, Literal, NamedTuple

import msgspec

State = Literal["planned", "running", "finished", "stopped", "failed", "killed"]
"""State of a run, read from its files: see `qdist.host.run.state`."""
Kind = Literal[
    "load",
    "start",
    "step",
    "eval",
    "verify",
    "checkpoint",
    "resume",
    "end",
    "inventory",
    "gradients",
    "starting",
    "scored",
]

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_UNSTEADY = 3
"""First steps of a run, while kernels are chosen and memory grows."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One JSON line of `events/rank000.jsonl`. Only what means something for the kind is written.

    A float that is NaN or infinite is written as null and read back as NaN: JSON has neither, and absent is None.
    """

    kind: Kind
    step: Count = 0
    """Optimizer steps finished so far. For `start` and `resume`: the step that the run goes on from. For `scored`:
    items of the task in `note`, of `total_steps`."""
    total_steps: Count = 0
    loss: float | None = None
    held_out_loss: float | None = None
    task: str = ""
    """For `eval`: the task of `figure`; empty for the held-out loss."""
    figure: float | None = None
    """What a task that is measured in training came to."""
    rises: bool = False
    """Whether more of `figure` is better."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: Count = 0
    """Tokens of all ranks in this step."""
    padding: Count = 0
    """Positions of all ranks' micro-batches in this step that hold no token."""
    own_tokens: Count = 0
    """Tokens of this rank's micro-batches."""
    seconds: float = 0.0
    """Seconds of this step; for `load`, of loading the backbone."""
    data_s: float = 0.0
    """Seconds of the step that this rank spent on making samples."""
    busy_s: float = 0.0
    """This rank's forward and backward passes, `data_s` included, before it waits for gradients of other ranks. Under
    ZeRO, which adds gradients up during the last backward pass, and in a pipeline, waiting is part of it."""
    update_s: float = 0.0
    """Seconds of the optimizer step."""
    read_bytes: Count = 0
    """For `load`: bytes that this rank read from disk, without pages that were already in memory."""
    memory_bytes: Count = 0
    """Peak bytes of this rank so far; on the CPU, its largest resident set."""
    rank: Count = 0
    time: float = 0.0
    """Seconds since the epoch, set by the caller."""
    skipped: bool = False
    """Whether the update was skipped because the gradients were NaN or infinite."""
    note: str = ""


_EVENTS = msgspec.json.Decoder(Event)
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BLOCK_BYTES = 1 << 20
"""Bytes of lines that are decoded together."""


def encode(event: Event) -> bytes:
    """One line, newline included, to be written in a single append."""
    return msgspec.json.encode(event) + b"\n"


class Block(NamedTuple):
    """A block of lines of an event file."""

    events: list[Event]
    lines: int
    bad: tuple[int, ...] = ()
    """Numbers of the lines that are not events: a power loss can leave NUL bytes, for example."""


def decode_lines(data: bytes) -> list[Event]:
    """Events of every line that ends; what follows the last newline was torn by a kill and is left out.

    So is a line that is not an event: `decode_blocks` tells which.
    """
    return list(chain.from_iterable(block.events for block in decode_blocks(data)))


def decode_blocks(data: bytes, *, first_line: int = 1) -> Iterator[Block]:
    """The same, some thousand events at a time.

    first_line: number of the first line, for a reader that goes on where it stopped.
    """
    start, end = 0, whole_length(data)
    while start < end:
        stop = end if end - start <= _BLOCK_BYTES else data.rfind(b"\n", start, start + _BLOCK_BYTES) + 1 or end
        found = _decode_block(data[start:stop], first_line)
        yield found
        start, first_line = stop, first_line + found.lines


def whole_length(data: bytes) -> int:
    """Bytes up to the end of the last whole line: where a resumed rank cuts its file before it appends."""
    return data.rfind(b"\n") + 1


def _decode_block(block: bytes, first_line: int) -> Block:
    """Decode whole lines. Those that may hold a NaN, or are not events, are decoded one by one."""
    if b"null" not in block and b"\n\n" not in block and not block.startswith(b"\n"):
        try:
            found = _EVENTS.decode_lines(block)
            return Block(found, len(found))
        except _UNDECODABLE:
            pass  # the line that is at fault is found below
    events = [_decode(line) for line in block.split(b"\n")[:-1]]
    bad = tuple(number for number, event in enumerate(events, first_line) if event is None)
    return Block([event for event in events if event is not None], len(events), bad)


def _decode(line: bytes) -> Event | None:
    """None for a line that is not an event. NUL bytes before one are what was to be there of lines that were lost."""
    line = line.lstrip(b"\0")
    try:
        fields = msgspec.json.decode(line, type=dict[str, str | int | float | bool | None])
        return msgspec.convert({key: math.nan if value is None else value for key, value in fields.items()}, Event)
    except _UNDECODABLE:
        return None


def losses(events: Iterable[Event]) -> dict[int, float]:
    """Loss of each step from one rank's events: the last word on each, since a resumed run repeats steps.

    A `start` or `resume` takes back the steps after it: until they are repeated, they did not happen.
    """
    found: dict[int, float] = {}
    for event in events:
        if event.kind in ("start", "resume"):
            found = {step: loss for step, loss in found.items() if step <= event.step}
        elif event.kind == "step" and event.loss is not None:
            found[event.step] = event.loss
    return dict(sorted(found.items()))


class SteadySpeed(NamedTuple):
    """Speed of all ranks together; None if there was no step."""

    tokens_s: float | None
    """Tokens/s without padding."""
    positions_s: float | None
    """Positions/s, padding included."""


def steady_speed(events: Iterable[Event]) -> SteadySpeed:
    """Medians of the last stretch, from the first rank's events, without the first steps if there are more.

    Passes are not captured before their gradients were watched: neither those steps count nor the next, which captures.
    """
    steps: list[Event] = []
    unsteady = _UNSTEADY
    for event in events:
        if event.kind in ("start", "resume"):
            steps, unsteady = [], _UNSTEADY
        elif event.kind == "step" and event.seconds > 0:
            steps.append(event)
        elif event.kind == "gradients":
            unsteady = max(unsteady, len(steps) + 1)
    steady = steps[unsteady:] or steps
    if not steady:
        return SteadySpeed(None, None)
    return SteadySpeed(
        median(step.tokens / step.seconds for step in steady),
        median((step.tokens + step.padding) / step.seconds for step in steady),
    )


def write_phases(seconds: Mapping[str, float]) -> str:
    """The note of a `starting` event: 'launch 0.4 s, imports 5.1 s'."""
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def read_phases(note: str) -> dict[str, float]:
    """What `write_phases` was given, rounded."""
    return {name: float(value) for name, value in re.findall(r"([a-z ]+?) (-?\d+\.\d+) s(?:, |$)", note)}


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """How a run got to its first step. Seconds are since its plan was written; None if unknown."""

    load_s: float | None
    """Seconds until the last rank had loaded the backbone."""
    first_step_s: float | None
    """Seconds until the first step was done."""
    loading_s: float
    """Seconds that the slowest rank spent on loading; 0 if unknown."""
    read_bytes: int
    """Bytes read from disk while loading, all ranks together."""
    phases: dict[str, float] = {}
    """Seconds of rank 0 up to its first step by what they were spent on; empty if unknown."""


def start_of(events: Iterable[Event], *, planned_at: float) -> Start:
    """The start, from the events of all ranks; events older than the plan belong to an earlier launch."""
    since = [event for event in events if event.time >= planned_at]
    loads = {event.rank: event for event in since if event.kind == "load"}
    steps = [event.time for event in since if event.kind == "step"]
    begun = next((event for event in since if event.kind == "starting" and not event.rank), None)
    phases = read_phases(begun.note) if begun else {}
    if begun and steps:
        before = [event.time for event in since if event.kind == "eval" and event.time < min(steps)]
        judged = max(before, default=None)
        if judged is not None:
            phases["evaluation"] = round(judged - begun.time, 2)
        phases["first step"] = round(min(steps) - (judged or begun.time), 2)
    return Start(
        load_s=max(event.time for event in loads.values()) - planned_at if loads else None,
        first_step_s=min(steps) - planned_at if steps else None,
        loading_s=max((event.seconds for event in loads.values()), default=0.0),
        read_bytes=sum(event.read_bytes for event in loads.values()),
        phases=phases,
    )
