"""What did someone mean who mistyped a setting or its value, and what could be typed instead?"""

import re
from collections.abc import Sequence
from typing import Any

from qdist.core.changes import Change, typed
from qdist.core.errors import SpecError, nearest

__all__ = ["known_as", "not_among", "of_another_kind", "typed", "unknown"]

_SYNONYMS = {
    "learning_rate": "optim.lr", "batch_size": "global_batch", "per_device_train_batch_size": "micro_batch",
    "lora_r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "max_grad_norm": "optim.clip",
    "max_steps": "steps", "num_train_epochs": "epochs", "max_seq_length": "seq_len", "cutoff_len": "seq_len",
    "target_modules": "lora.targets", "gradient_checkpointing": "train.checkpointing", "rank": "lora.r",
    "lr_scheduler_type": "optim.schedule", "quant_type": "quant.type", "double_quant": "quant.double",
    "adam_beta2": "optim.beta2", "warmup": "optim.warmup_steps", "val_set_size": "train.held_out",
    "source_max_len": "seq_len", "report_to": "trackers", "stage": "zero.stage", "zero_stage": "zero.stage",
}  # fmt: skip

_OFFLOADED: Change = {"placement": "split", "split.offload_layers": 8}
_SHARDED, _REPLICATED, _SPLIT = ({"placement": name} for name in ("shard", "replicate", "split"))
_ELSEWHERE: dict[str, dict[str, Change]] = {
    "placement": {
        "offload": _OFFLOADED, "cpu": _OFFLOADED,
        "fsdp": _SHARDED, "fsdp2": _SHARDED, "full_shard": _SHARDED,
        "ddp": _REPLICATED, "data": _REPLICATED, "dp": _REPLICATED,
        "pipeline": _SPLIT, "pp": _SPLIT, "device_map": _SPLIT,
        "1f1b": {"placement": None, "split.schedule": "1f1b"},
        "sequential": {"placement": None, "split.schedule": "sequential"},
    },
}  # fmt: skip
"""What other tools call a value."""


def unknown(key: str, settings: Sequence[str], value: Any = None) -> SpecError:
    """The error for a setting that does not exist, naming the nearest that does. value: what it was to be set to."""
    by_leaf, leaf = _by_leaf(settings), key.rpartition(".")[2]
    guess = known_as(key, settings) or nearest(key, settings) or by_leaf.get(nearest(leaf, by_leaf) or "")
    message = f"unknown setting {key!r}"
    if guess and value is not None:
        return SpecError(message, ways=[{guess: value}])
    return SpecError(message, try_=guess or "a setting that `qdist launch --help` lists")


def known_as(name: str, settings: Sequence[str]) -> str | None:
    """The setting whose last part is that of `name`, or that other programs call so; None where there is none."""
    leaf = name.rpartition(".")[2]
    return _by_leaf(settings).get(leaf) or _SYNONYMS.get(leaf)


def _by_leaf(settings: Sequence[str]) -> dict[str, str]:
    return {name.rpartition(".")[2]: name for name in settings}


def not_among(key: str, value: Any, choices: Sequence[str], usual: str = "") -> SpecError:
    """The error for a value that is none of the few that there are. usual: the one to try where none is near."""
    meant = _ELSEWHERE.get(key, {}).get(str(value).lower().replace("-", "_"))
    guess = nearest(str(value), choices) or usual or choices[0]
    return SpecError(
        f"{key} cannot be {value!r}: it is one of {', '.join(choices)}",
        ways=[meant or {key: guess}, {key: usual or choices[0]}],
    )


def of_another_kind(key: str, value: Any, reason: str, usual: Change) -> SpecError:
    """The error for a number out of its range, or what is no number.

    reason: msgspec's.
    usual: what may be typed instead, if there is such.
    """
    # What was got shows already, and as a flag's or recipe's text it is a `str` whatever it looks like.
    wanted = reason.partition(", got ")[0].replace(" | null", "")
    for kind, words in (("`int`", "a whole number"), ("`float`", "a number"), ("`bool`", "true or false")):
        wanted = wanted.replace(kind, words)
    wanted = re.sub(r" number >= ([\d.]+)$", r" number, \1 or more", wanted)
    return SpecError(
        f"{key} cannot be {value!r}: {wanted[:1].lower()}{wanted[1:]}",
        try_="" if usual else f"another value for {key}",
        ways=[usual] if usual else [],
    )
