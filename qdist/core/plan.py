"""What a plan is: every decision of a run, made once. `qdist.core.planner` makes it, the rest derives from it."""

import hashlib
from typing import Literal

import msgspec

from qdist.core.facts import ModelFacts
from qdist.core.memory import MemoryBudget
from qdist.core.spec import RunSpec

VERSION = 1


class DataFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenized data set. Lengths in tokens."""

    path: str
    """The token cache; empty for synthetic data."""
    samples: int
    train_samples: int
    held_out_samples: int
    tokens: int
    longest: int


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the backbone comes from."""

    kind: Literal["folder", "dummy"]
    path: str
    """The folder of a pretrained model; empty for random weights."""
    config: dict[str, object]
    """transformers' configuration, from which random weights are made."""
    tokenizer: str
    """The folder of the repaired tokenizer; empty where there is none."""
    new_token_ids: tuple[int, ...] = ()
    """Vocabulary rows that the repair added."""
    vocab_rows: int | None = None
    """Rows of the embedding after the repair, where it added any."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be there before a plan: the model as a folder, its tokenizer, the tokenized data."""

    source: Source
    data: DataFacts | None
    notes: tuple[str, ...] = ()
    """What was repaired, cut or dropped, for the user."""


class RankPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one process owns. `expected` is aligned with `gpus`; a CPU rank has one entry and no GPU."""

    rank: int
    node: int
    gpus: tuple[int, ...]
    expected: tuple[MemoryBudget, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run, decided. Encodings (DeepSpeed, Accelerate, the launch script) are derived from it."""

    version: int = VERSION
    spec: RunSpec
    source: Source
    facts: ModelFacts
    data: DataFacts | None
    device: Literal["cuda", "cpu"]
    placement: Literal["replicate"] = "replicate"
    world_size: int
    micro_batch: int
    gradient_accumulation: int
    steps: int
    seq_len: int
    """Longest sequence that the ranks will see: `spec.seq_len`, or less where the data are shorter."""
    checkpointing: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    optimizer: Literal["adamw", "paged-adamw"]
    engine: Literal["torch", "deepspeed"]
    zero_stage: int
    liger: bool
    threads_per_rank: int
    memory_cap_bytes: int | None
    ranks: tuple[RankPlan, ...]
    notes: tuple[str, ...]
    """What was decided for the user, and why; the alternatives that lost."""


def digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(plan, order="sorted")).hexdigest()
