"""What do other tools call a placement, and which settings go with one placement alone?"""

from collections.abc import Iterator, Mapping
from typing import Any

from qdist.core.errors import Change, SpecError

_OFFLOADED: Change = {"placement": "split", "split.offload_layers": 8}
_SHARDED, _REPLICATED, _SPLIT = ({"placement": name} for name in ("shard", "replicate", "split"))
CALLED_ELSEWHERE: dict[str, Change] = {
    "offload": _OFFLOADED, "cpu": _OFFLOADED,
    "fsdp": _SHARDED, "fsdp2": _SHARDED, "full_shard": _SHARDED,
    "ddp": _REPLICATED, "data": _REPLICATED, "dp": _REPLICATED,
    "pipeline": _SPLIT, "pp": _SPLIT, "device_map": _SPLIT,
    "1f1b": {"placement": None, "split.schedule": "1f1b"},
    "sequential": {"placement": None, "split.schedule": "sequential"},
}  # fmt: skip
"""What other tools call a placement, and ours a schedule, as the settings that were meant."""


def verified(now: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[SpecError]:
    """A rule of `contradictions`: only sharded bytes are gathered, and can be compared."""
    if now["train.verify_steps"] and now["placement"] != "shard":
        yield SpecError(
            f"train.verify_steps={now['train.verify_steps']} compares the bytes of a sharded backbone",
            ways=[{"train.verify_steps": 0}, _SHARDED],
        )
