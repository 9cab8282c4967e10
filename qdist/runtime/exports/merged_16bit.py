"""Writes a merged 16-bit model: frozen weights plus adapters' updates, rounded once, one file per decoder layer."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.core.requests import Folding, Onto
from qdist.core.text import counted, format_bytes, format_duration
from qdist.host.files import require_space
from qdist.host.terminal import say
from qdist.runtime.exports.backbone import Backbone, Weight
from qdist.runtime.exports.model_files import write_model_files
from qdist.runtime.exports.stored_layout import as_stored
from qdist.runtime.exports.update import Adapters, Folded, Update
from qdist.runtime.formats.packed_folder import Entry, file_name, finished, write_index, write_missing
from qdist.runtime.formats.recorded_sums import keep_sums
from qdist.runtime.formats.work_folder import filled, reserved
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.skeleton import DTYPES
from qdist.runtime.model.weights import stored_buffers

_ROWS = 1024
"""Rows of a matrix held in float32 at a time."""


class Merged:
    """The weights of a backbone with adapters merged into it, computed on demand."""

    def __init__(self, backbone: Backbone, adapters: Adapters, dtype: torch.dtype) -> None:
        """dtype: bfloat16 or float16."""
        self.backbone, self.adapters, self.dtype = backbone, adapters, dtype
        self._opened: _OpenedExperts | None = None

    def weights(self) -> tuple[Weight, ...]:
        """All weights; a tied table is listed once."""
        return self.backbone.weights()

    @cached_property
    def folded(self) -> Folded:
        """What of the adapters these weights hold. Raises ModelError if anything of them would be lost."""
        return self.adapters.require_folded({weight.name for weight in self.weights()}, self.backbone.tables)

    def read(self, name: str) -> torch.Tensor:
        """A weight, rounded to `dtype`. Raises ModelError if that cannot hold it."""
        if name in self._expert_names:
            return self._experts(name)
        path, _, leaf = name.rpartition(".")
        update = self.adapters.of(path) if leaf == "weight" and path in self.adapters.paths else None
        frozen = self.backbone.read(name)
        if name in self._buffers:
            return frozen
        merged = torch.empty(frozen.shape, dtype=self.dtype, device=frozen.device)
        for first in range(0, len(frozen), _ROWS):
            rows = frozen[first : first + _ROWS].float()
            if update is not None:
                rows = rows + _rows(update, first, rows.device)
            _require_range(rows, name, self.dtype)
            merged[first : first + _ROWS] = rows
        trained = self.adapters.rows(path) if leaf == "weight" else None
        if trained is not None:
            _require_range(trained, name, self.dtype)
            merged[list(self.backbone.source.new_token_ids)] = trained.to(merged.device, self.dtype)
        return merged

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(weight.name for weight in self.weights() if weight.buffer_dtype is not None)

    @cached_property
    def _expert_names(self) -> frozenset[str]:
        experts = self.backbone.plan.facts.experts
        return frozenset(f"{path}.{each.name}" for path, own in experts.items() for each in own.matrices)

    def _experts(self, name: str) -> torch.Tensor:
        """A parameter of experts, a matrix in float32 at a time."""
        count = self.backbone.plan.facts.experts[name.rpartition(".")[0]].count
        return torch.stack([self.matrix(name, expert) for expert in range(count)])

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """An expert's matrix in a parameter, as the class holds it."""
        path = name.rpartition(".")[0]
        if self._opened is None or self._opened.path != path:
            self._opened = None  # before the next ones are read
            self._opened = _OpenedExperts(self, path)
        return self._opened.matrix(name, expert)

    def of(self, path: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
        """A module's tensors, with the interface that `skeleton.fill` expects."""
        return _OfModule(self, path, [*dict(module.named_parameters(recurse=False)), *stored_buffers(module)])

    def check(self) -> None:
        """Nothing left to check: each weight is verified as it is read."""
        self.backbone.check()


class _OpenedExperts:
    """The matrices of one layer's experts, merged one at a time; the last of each parameter is kept for its halves."""

    def __init__(self, merged: Merged, path: str) -> None:
        self.path, self._merged = path, merged
        self._transposed = merged.backbone.plan.facts.experts[path].transposed
        self._frozen: dict[str, Callable[[int], torch.Tensor]] = {}
        self._updates: dict[str, tuple[Update, ...] | None] = {}
        self._last: dict[str, tuple[int, torch.Tensor]] = {}

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        if name not in self._frozen:
            self._frozen[name] = self._merged.backbone.matrix_of(name)
            self._updates[name] = self._merged.adapters.of_experts(name)
        if self._last.get(name, (None,))[0] != expert:
            self._last[name] = expert, self._added(name, expert)
        return self._last[name][1]

    def _added(self, name: str, expert: int) -> torch.Tensor:
        value, updates = self._frozen[name](expert).float(), self._updates[name]
        if updates is not None:
            change = updates[expert].dense().to(value.device)
            value = value + (change.t() if self._transposed else change)
        _require_range(value, name, self._merged.dtype)
        return value.to(self._merged.dtype)


class _OfModule(Mapping[str, torch.Tensor]):
    """The tensors of one module by their names in it, computed on access."""

    def __init__(self, merged: Merged, path: str, names: list[str]) -> None:
        self._merged, self._path, self._names = merged, path, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._merged.read(f"{self._path}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rows(update: Update, first: int, device: torch.device) -> torch.Tensor:
    """The update of `_ROWS` rows from `first` on, float32."""
    terms = [
        term._replace(up=term.up[first : first + _ROWS].to(device), down=term.down.to(device)) for term in update.terms
    ]
    return Update(tuple(terms)).dense()


def _require_range(values: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Refuse values that would round to infinity."""
    if dtype != torch.float16:
        return  # bfloat16 holds what float32 holds
    low, high = (float(end) for end in values.aminmax())
    largest = torch.finfo(dtype).max
    if max(-low, high) > largest:
        raise ModelError(
            f"{name} reaches {max(-low, high):.3g} once merged; float16 ends at {largest:,.0f}", try_="--dtype bfloat16"
        )


_VERSION = 2
"""Increment whenever the same runs would give different bytes."""
_BESIDE_BYTES = 32 << 20
"""Upper bound on the bytes of tokenizer, index and configurations."""


def run(request: Folding) -> None:
    """Write the model and report on it."""
    began = time.monotonic()
    size, folded = write(
        Adapters.named_in(request), Path(request.out), onto=request.backbone, dtype=DTYPES[request.stored]
    )
    took = format_duration(time.monotonic() - began)
    what = f"{counted(len(request.runs), 'adapter')} merged onto the {request.backbone} backbone, {request.stored}"
    say(f"{request.out}: {what}, {format_bytes(size)}, {took}")
    say(str(folded))


def write(adapters: Adapters, out: Path, *, onto: Onto, dtype: torch.dtype) -> tuple[int, Folded]:
    """Write W + factor B A, summed in float32 and rounded once. Returns the bytes of all tensors, and what was folded.

    out: must be empty or absent. dtype: bfloat16 or float16.
    Raises RunError if `out` exists or the original is not available; ModelError for a weight that float16 cannot
    hold, and for an adapter's tensor that changes none; PlanError when the disk is too small.
    """
    with reserved(out):
        merged = Merged(Backbone(adapters.plan, onto=onto), adapters, dtype)
        folded = merged.folded
        files = _files(merged)
        with filled(out, _identity(merged, onto)) as work:
            written = {name: there for name in files if (there := finished(work, name))}
            missing = sum(entry.bytes for name in files if name not in written for entry in files[name])
            require_space(out.parent, missing + _BESIDE_BYTES, purpose=f"writing {out.name}")
            written = write_missing(work, files, files.__getitem__)
            backbone = merged.backbone
            write_model_files(work, backbone.model, backbone.plan, dtype)
            keep_sums(work, written.values())
            write_index(work, written)
    return sum(part.tensor_bytes for part in written.values()), folded


def _files(merged: Merged) -> dict[str, list[Entry]]:
    """The entries of each file, without computing them yet."""
    backbone, layers = merged.backbone, merged.backbone.layers
    positions = {weight.name: weight.position for weight in merged.weights()}
    files: dict[str, list[Entry]] = {file_name(position, layers): [] for position in range(layers + 1)}
    model = empty_model(copy.deepcopy(backbone.model.config), whole=True)
    own = [*map(partial(_entry, merged), merged.weights()), *backbone.towers()]
    for entry, source in as_stored(own, model, backbone.plan.facts.experts, merged.matrix):
        files[file_name(positions.get(source.name, layers), layers)].append(entry)
    return files


def _entry(merged: Merged, weight: Weight) -> Entry:
    """A weight as its class holds it."""
    turned = merged.backbone.is_transposed(weight.name)
    shape = weight.shape[::-1] if turned else weight.shape
    make = partial(_transposed, merged, weight.name) if turned else partial(merged.read, weight.name)
    return Entry(weight.name, weight.buffer_dtype or merged.dtype, shape, make)


def _transposed(merged: Merged, name: str) -> torch.Tensor:
    return merged.read(name).t()


def _identity(merged: Merged, onto: Onto) -> str:
    """SHA-256 of what determines the bytes: adapters and weights, the backbone, and the target dtype."""
    contents = [_VERSION, merged.adapters.stamp, onto, str(merged.dtype), merged.backbone.identity()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
