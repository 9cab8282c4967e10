"""What a rank is at now: a small file that it writes again every second, beside the events that it appends to."""

from typing import Literal

import msgspec

Phase = Literal["starting", "loading", "training", "updating", "evaluating", "saving", "finishing", "ended"]

WORDS: dict[Phase, str] = {
    "starting": "starting",
    "loading": "loading the backbone",
    "training": "in forward and backward passes",
    "updating": "in the optimizer's step",
    "evaluating": "evaluating",
    "saving": "writing a checkpoint",
    "finishing": "writing the results",
    "ended": "ended",
}
UNMEASURED: frozenset[Phase] = frozenset(("starting", "loading", "saving", "finishing"))
"""Phases that say nothing of how far they are, so that a long one is no sign of a rank that is stuck."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rank, alive when it wrote this."""

    rank: int
    pid: int
    host: str
    launch: str = ""
    """The id of the launch that started it; empty where its launch.sh was started by hand."""
    time: float
    """Seconds since the epoch, of this beat."""
    phase: Phase = "starting"
    moved: float = 0.0
    """Seconds since the epoch: when the phase, the step or the micro-batch last changed."""
    step: int = 0
    """The step that it works on, from 1."""
    micro_batch: int = 0
    """Of its own in this step, from 1; 0 outside of training and evaluating."""
    micro_batches: int = 0
    memory_bytes: int = 0
    """Now: tensors and context on its GPUs, all of them together; on the CPU its resident set."""

    def __str__(self) -> str:
        """'in forward and backward passes of step 12, micro-batch 3 of 8'."""
        where = f" of step {self.step}" if self.phase in ("training", "updating") else ""
        part = f", micro-batch {self.micro_batch} of {self.micro_batches}" if self.micro_batch else ""
        return WORDS[self.phase] + where + part


def encode(pulse: Heartbeat) -> bytes:
    """JSON and a newline."""
    return msgspec.json.encode(pulse) + b"\n"
