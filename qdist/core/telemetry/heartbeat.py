"""A rank's current state: a small file that it rewrites every second, beside the events that it appends."""

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
"""Phases without progress reports, so that a long one is no sign of a stuck rank."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Heartbeat of one rank, which was alive when it wrote this."""

    rank: int
    pid: int
    host: str
    launch: str = ""
    """Id of the launch that started the rank; empty if its launch.sh was started by hand."""
    time: float
    """Time of this heartbeat, in seconds since the epoch."""
    phase: Phase = "starting"
    moved: float = 0.0
    """Time of the last change of phase, step or micro-batch, in seconds since the epoch."""
    step: int = 0
    """Current step, from 1."""
    micro_batch: int = 0
    """This rank's current micro-batch in the step, from 1; 0 outside training and evaluation."""
    micro_batches: int = 0
    memory_bytes: int = 0
    """Current bytes of tensors and context on all its GPUs together; on the CPU, its resident set."""

    def __str__(self) -> str:
        """'in forward and backward passes of step 12, micro-batch 3 of 8'."""
        where = f" of step {self.step}" if self.phase in ("training", "updating") else ""
        part = f", micro-batch {self.micro_batch} of {self.micro_batches}" if self.micro_batch else ""
        return WORDS[self.phase] + where + part


def encode(pulse: Heartbeat) -> bytes:
    """A heartbeat as JSON and a newline."""
    return msgspec.json.encode(pulse) + b"\n"
