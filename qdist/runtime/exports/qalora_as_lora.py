"""QA-LoRA adapters as an ordinary LoRA adapter over the same base: A's columns repeated for each input of a group.

B A pool(x) = B A' x where A' repeats the columns of A; the sum of several adapters is one of their ranks together. So
PEFT and vLLM compute what the run computed, without knowing of groups.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import RunError
from qdist.core.requests import Export
from qdist.core.text import counted, format_bytes
from qdist.host.files import require_space
from qdist.host.sources.targets import ADAPTER
from qdist.host.terminal import say
from qdist.runtime.adapters.lora import tensor_name, unscaled
from qdist.runtime.adapters.qa_lora import UNPOOLED
from qdist.runtime.data.tokenizer import copy_beside
from qdist.runtime.exports.update import Adapters, Folded, Update
from qdist.runtime.formats.packed_folder import Entry, write_tensors
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG
from qdist.runtime.formats.work_folder import built
from qdist.runtime.quantize.pack import goes_along

_VERSION = 1
"""Increment whenever the same runs would give different bytes."""


def run(request: Export) -> None:
    """Write the adapter and report on it."""
    adapters, out = Adapters.named_in(request), Path(request.out)
    folded, plan, rank = widen(adapters, out), adapters.plan, rank_of(adapters)
    size = format_bytes((out / ADAPTER).stat().st_size)
    readers = "PEFT" if plan.source.new_token_ids else "PEFT and vLLM"
    say(f"{out}: LoRA r={rank}, {size}, for {readers} over {plan.source.path or plan.spec.model}")
    say(str(folded))


def widen(adapters: Adapters, out: Path) -> Folded:
    """Write the adapter folder `out`, which must not exist. Returns what of the adapters is in it.

    Factors go into A, so that alpha equals r: PEFT's `alpha_pattern`, which vLLM does not read, is not needed.
    Raises RunError if there is nothing to widen or to add up, and for adapters of experts.
    """
    if adapters.experts:
        raise RunError(
            f"{adapters.runs[0].path} has adapters of experts, which PEFT's layout does not hold added up",
            try_="--to vllm, or qdist merge",
        )
    if len(adapters.runs) == 1 and adapters.pool == 1:
        raise RunError(_has_it_already(adapters), try_=f"{adapters.runs[0].adapter} as it is")
    gptq = adapters.plan.source.gptq
    if gptq is not None and gptq.offset is not None:
        raise RunError(
            f"{adapters.plan.source.path} has an adapter merged into it, and no other program opens it: an adapter "
            "over it would be of no use there",
            try_="--to 16bit, or gguf",
        )
    rank = rank_of(adapters)
    with built(out, f"lora {_VERSION} {adapters.stamp}") as work:
        entries = [*matrices(adapters, rank), *_rows(adapters)]
        require_space(out.parent, sum(entry.bytes for entry in entries), purpose="the adapter")
        write_tensors(work, ADAPTER, entries)
        (work / ADAPTER_CONFIG).write_text(json.dumps(_config(adapters, rank), indent=2) + "\n")
        copy_others(adapters, work)
    count = len(adapters.paths)
    return Folded(count, count, 0, 0)


def rank_of(adapters: Adapters) -> int:
    """The rank of the sum of all adapters."""
    return sum(int(config["r"]) for config in adapters.configs)


def copy_others(adapters: Adapters, folder: Path) -> None:
    """Copy what lies beside the first adapter, such as its tokenizer."""
    for path in sorted(adapters.runs[0].adapter.iterdir()):
        if goes_along(path) and path.name != ADAPTER_CONFIG:
            copy_beside(path, folder)


def _has_it_already(adapters: Adapters) -> str:
    rows = len(adapters.plan.source.new_token_ids)
    if not rows:
        return f"{adapters.runs[0].path} has plain LoRA already"
    return (
        f"{adapters.runs[0].path} has LoRA and {counted(rows, 'trained row')} of the vocabulary already; PEFT reads "
        "the rows, vLLM does not"
    )


def matrices(adapters: Adapters, rank: int) -> list[Entry]:
    """A and B of every linear that the adapters change."""
    entries = []
    for path in sorted(adapters.paths):
        update = adapters.of(path)
        assert update is not None
        outputs, first = update.terms[0].up.shape[0], update.terms[0]
        shapes = {"A": (rank, first.down.shape[1] * first.pool), "B": (outputs, rank)}
        entries += [
            Entry(tensor_name(path, side), torch.float32, shape, partial(_side, adapters, path, side, rank))
            for side, shape in shapes.items()
        ]
    return entries


def _side(adapters: Adapters, path: str, side: str, rank: int) -> torch.Tensor:
    update = adapters.of(path)
    assert update is not None
    return joined(update, side, rank)


def joined(update: Update, side: str, rank: int) -> torch.Tensor:
    """A [r, in] or B [out, r] of all adapters concatenated; zeros for those that do not change this matrix."""
    if side == "A":
        parts = [term.factor * term.down.repeat_interleave(term.pool, dim=1) for term in update.terms]
        downs = torch.cat(parts)
        return torch.nn.functional.pad(downs, (0, 0, 0, rank - downs.shape[0]))
    ups = torch.cat([term.up for term in update.terms], dim=1)
    return torch.nn.functional.pad(ups, (0, rank - ups.shape[1]))


def _rows(adapters: Adapters) -> list[Entry]:
    """Trained rows of new tokens, unchanged."""
    return [entry for entry in adapters.entries(0) if ".lora_" not in entry.name]


def _config(adapters: Adapters, rank: int) -> dict[str, Any]:
    named = [config["target_modules"] for config in adapters.configs]
    expressions = dict.fromkeys(f"(?:{each})" for each in named if isinstance(each, str))
    # Adapters of one model are all written with expressions, or none is.
    targets = "|".join(expressions) if expressions else sorted({name for names in named for name in names or ()})
    return {**adapters.configs[0], **unscaled(rank), **UNPOOLED, "target_modules": targets}
