"""Adapters of experts in the layout that vLLM reads: an expert at a time, in the names of the hub's checkpoints.

vLLM looks for `experts.N.gate_proj`, `up_proj` and `down_proj`, or what a family calls them, of every expert. Halves of
one parameter share its A and have their rows of its B. Families whose checkpoints hold experts together it reads in
PEFT's own layout, if both parameters are there. What has no adapter is written as zeros.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import RunError
from qdist.core.model.families import FAMILIES
from qdist.core.model.shapes import Experts
from qdist.core.requests import Export
from qdist.core.text import format_bytes
from qdist.host.files import require_space
from qdist.host.sources.targets import ADAPTER
from qdist.host.terminal import say
from qdist.runtime.adapters.lora import tensor_name, unscaled
from qdist.runtime.adapters.qa_lora import UNPOOLED
from qdist.runtime.exports.qalora_as_lora import copy_others, joined, matrices, rank_of
from qdist.runtime.exports.stored_layout import OfExpert, expert_parts
from qdist.runtime.exports.update import Adapters, Folded, Update
from qdist.runtime.formats.packed_folder import Entry, write_tensors
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG
from qdist.runtime.formats.work_folder import built
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.skeleton import config_behind

_VERSION = 1
"""Increment whenever the same runs would give different bytes."""
_INNER = "base_layer"
"""PEFT's name of the first of two parameters of a module: the second one's adapter lies around it."""
UpdatesOf = Callable[[str], tuple[Update, ...] | None]


def run(request: Export) -> None:
    """Write the adapter and report on it."""
    adapters, out = Adapters.named_in(request), Path(request.out)
    folded = write(adapters, out)
    plan, size = adapters.plan, format_bytes((out / ADAPTER).stat().st_size)
    say(f"{out}: LoRA r={rank_of(adapters)}, {size}, for vLLM over {plan.source.path or plan.spec.model}")
    say(str(folded))


def write(adapters: Adapters, out: Path) -> Folded:
    """Write the adapter folder `out`, which must not exist. Returns what of the adapters is in it.

    Raises RunError where vLLM reads the adapter as it is, or could not use it; ModelError for a tensor of an adapter
    that is of no linear and no expert.
    """
    _require_use(adapters)
    model = empty_model(config_behind(adapters.plan.source), whole=True)
    folded = adapters.require_folded({name for name, _ in model.named_parameters()}, ())
    entries, leaves = _of_experts(adapters, model)
    _write(adapters, out, [*matrices(adapters, rank_of(adapters)), *entries], leaves)
    return folded


def _of_experts(adapters: Adapters, model: Any) -> tuple[list[Entry], set[str]]:
    """The tensors of every layer's experts that have an adapter, and the leaf names of their linears if they are apart.

    model: the class, on the meta device.
    """
    facts, rank = adapters.plan.facts, rank_of(adapters)
    modules = {name.rpartition(".")[0] for name in adapters.experts}
    experts = {path: own for path, own in facts.experts.items() if path in modules}
    parts = expert_parts(model, experts)
    read = lru_cache(maxsize=4)(adapters.of_experts)  # the parameters of one layer, whose matrices are written in turn
    if all(f"{path}.{each.name}" in parts for path, own in experts.items() for each in own.matrices):
        apart = [part for each in parts.values() for part in each]
        return [*_one_by_one(apart, experts, read, rank)], {part.module.rpartition(".")[2] for part in apart}
    family = FAMILIES.get(facts.family)
    if family and family.experts_together:
        return [*_together(experts, read, rank)], set()
    raise RunError(
        f"{facts.family}'s checkpoints hold experts together, and how vLLM reads adapters of them is not known",
        try_="qdist merge, and serve the merged model",
    )


def _require_use(adapters: Adapters) -> None:
    run = adapters.runs[0]
    if not adapters.experts:
        plain = len(adapters.runs) == 1 and adapters.pool == 1
        raise RunError(
            f"{run.path} has no adapters of experts: vLLM reads plain LoRA",
            try_=f"{run.adapter} as it is" if plain else "--to lora",
        )
    if adapters.plan.source.new_token_ids:
        raise RunError(
            f"{run.path} has trained rows of the vocabulary, which vLLM does not read beside an adapter",
            try_="qdist merge, and serve the merged model",
        )


def _write(adapters: Adapters, out: Path, entries: list[Entry], leaves: set[str]) -> None:
    rank = rank_of(adapters)
    names = {path.rpartition(".")[2] for path in adapters.paths} | leaves
    given = {"target_modules": sorted(names), "target_parameters": None, "exclude_modules": None}
    config = {**adapters.configs[0], **unscaled(rank), **UNPOOLED, **given}
    with built(out, f"vllm {_VERSION} {adapters.stamp}") as work:
        require_space(out.parent, sum(entry.bytes for entry in entries), purpose="the adapter")
        write_tensors(work, ADAPTER, entries)
        (work / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        copy_others(adapters, work)


def _one_by_one(
    parts: Sequence[OfExpert], experts: Mapping[str, Experts], read: UpdatesOf, rank: int
) -> Iterator[Entry]:
    """A and B of each expert's matrices."""
    inputs = {f"{path}.{each.name}": each.inputs for path, own in experts.items() for each in own.matrices}
    for part in parts:
        shapes = {"A": (rank, inputs[part.parameter]), "B": (len(part.rows), rank)}
        for side, shape in shapes.items():
            make = partial(_of_expert, part, side, shape, read, rank)
            yield Entry(tensor_name(part.module, side), torch.float32, shape, make)


def _of_expert(part: OfExpert, side: str, shape: tuple[int, int], read: UpdatesOf, rank: int) -> torch.Tensor:
    updates = read(part.parameter)
    if updates is None:
        return torch.zeros(shape)
    whole = joined(updates[part.expert], side, rank)
    return whole if side == "A" else whole[part.rows]


def _together(experts: Mapping[str, Experts], read: UpdatesOf, rank: int) -> Iterator[Entry]:
    """PEFT's A [experts x r, in] and B [out, r x experts] of both parameters of each module."""
    for path, own in experts.items():
        first, last = own.matrices
        for matrix, module in ((first, f"{path}.{_INNER}"), (last, path)):
            shapes = {"A": (own.count * rank, matrix.inputs), "B": (matrix.outputs, rank * own.count)}
            for side, shape in shapes.items():
                make = partial(_stacked, f"{path}.{matrix.name}", side, shape, read, rank)
                yield Entry(tensor_name(module, side), torch.float32, shape, make)


def _stacked(name: str, side: str, shape: tuple[int, int], read: UpdatesOf, rank: int) -> torch.Tensor:
    updates = read(name)
    if updates is None:
        return torch.zeros(shape)
    whole = torch.stack([joined(update, side, rank) for update in updates])
    return whole.flatten(0, 1) if side == "A" else whole.permute(1, 2, 0).flatten(1)
