"""A run's frozen backbone, read one tensor at a time: unpacked as training sees it, or as it was before packing."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.errors import RunError
from qdist.core.model.storage import Packing
from qdist.core.planning.plan import Plan
from qdist.core.requests import Onto
from qdist.core.text import GIB
from qdist.host.sources.cache import source_identity
from qdist.runtime.formats.checksum import Sums
from qdist.runtime.formats.packed_folder import Entry, stored_entries, tensor_files
from qdist.runtime.formats.recorded_sums import expected_sums
from qdist.runtime.infer.load import with_packed
from qdist.runtime.infer.residence import free_bytes
from qdist.runtime.model.packed import PackedLinear, Slices
from qdist.runtime.model.packed_experts import PackedMatrices
from qdist.runtime.model.skeleton import DTYPES, fill, skeleton
from qdist.runtime.model.weights import FolderWeights, RandomWeights, Weights, is_transposed, stored_buffers, whole
from qdist.runtime.quantize.source import Originals, find_originals

_GPU_BYTES = 4 * GIB
"""Free bytes a GPU needs to unpack on it: twice the context and matrices of the largest models that qdist knows."""
_COLUMNS = 1024
"""Columns of a table that are averaged at a time."""


class Weight(NamedTuple):
    """A parameter, or a stored buffer, of the model before its backbone was packed."""

    name: str
    shape: tuple[int, ...]
    """Shape, including rows of new tokens."""
    position: int
    """Index of its decoder layer; the number of layers for anything outside them."""
    buffer_dtype: torch.dtype | None = None
    """Of a buffer, which keeps it whatever the dtype of the weights; None for a parameter."""


class Backbone:
    """The weights of a run's backbone under the names of transformers' modules, read on demand."""

    def __init__(self, plan: Plan, *, onto: Onto = "dequantized", device: torch.device | None = None) -> None:
        """Raises RunError if the original is not available, ModelError if the backbone is gone."""
        self.plan, self.device = plan, device or unpacking_device()
        self._originals = _originals(plan) if onto == "original" else None
        self.source = plan.source if self._originals else with_packed(plan)
        self.compute_dtype = DTYPES[plan.compute_dtype]
        self.model = skeleton(
            self.source,
            bits=plan.spec.bits,
            quant=plan.spec.quant,
            dtype=self.compute_dtype,
            facts=plan.facts,
        )
        """Model on the meta device; its linears are in packed form."""
        self.layers: int = plan.facts.layer_count
        self._weights = self._weights_of_modules()
        self.tables = self._paths_of_tables()
        """Module paths of the tables with rows for new tokens."""

    def weights(self) -> tuple[Weight, ...]:
        """All weights, in module order; a tied table is listed once."""
        found, seen = [], set[nn.Parameter]()
        for path, module in self.model.named_modules():
            if isinstance(module, PackedMatrices):
                found.append(Weight(path, tuple(module.shape), self._position(path)))
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                packed = isinstance(module, PackedLinear)
                if parameter not in seen and (not packed or leaf in ("weight", "bias")):
                    shape = self._shape(path, leaf, module, parameter)
                    found.append(Weight(f"{path}.{leaf}", shape, self._position(path)))
                seen.add(parameter)
            found += [
                Weight(f"{path}.{leaf}", tuple(buffer.shape), self._position(path), self.read(f"{path}.{leaf}").dtype)
                for leaf, buffer in stored_buffers(module).items()
            ]
        return tuple(found)

    def _position(self, path: str) -> int:
        layers = f"{self.plan.facts.modules.layers}."
        return int(path.removeprefix(layers).partition(".")[0]) if path.startswith(layers) else self.layers

    def read(self, name: str) -> torch.Tensor:
        """A weight as a new tensor on `device`, as the forward pass of the run's backbone uses it."""
        path, _, leaf = name.rpartition(".")
        if self._originals is not None:
            value = self._originals.tensors.read(name).to(self.device)
            value = value.t() if self.is_transposed(name) else value
        else:
            module = self.model.get_submodule(path)
            if isinstance(module, PackedLinear) and leaf == "weight":
                return self.linear(path).unpacked(self.device)
            value = (
                self._buffer(path, leaf, module)
                if leaf in stored_buffers(module)
                else self._weights.of(path, module)[leaf][:].to(self.device, module.get_parameter(leaf).dtype)
            )
            self.check()
        return self.with_new_rows(value) if path in self.tables else value

    def _buffer(self, path: str, leaf: str, module: nn.Module) -> torch.Tensor:
        """A stored buffer in the dtype that it is stored in; the class's own where no weights are stored."""
        tensors = self._weights.of(path, module)
        found: torch.Tensor = whole(tensors[leaf]) if leaf in tensors else stored_buffers(module)[leaf]
        return found.to(self.device)

    def is_transposed(self, name: str) -> bool:
        """Whether transformers' class holds a matrix as [inputs, outputs], which is read as [outputs, inputs]."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and is_transposed(self.model.get_submodule(path))

    def matrix_of(self, name: str) -> Callable[[int], torch.Tensor]:
        """What reads any one matrix of a parameter of experts as the class holds it, on `device`.

        It keeps the packed parameter in memory until it is dropped.
        """
        path, _, leaf = name.rpartition(".")
        if self._originals is not None:
            return _on(self.device, self._originals.tensors.matrix_of(name))
        if isinstance(getattr(self.model.get_submodule(path), leaf), PackedMatrices):
            return partial(self._unpacked, self.linear(name))
        stored = self._weights.of(path, self.model.get_submodule(path))[leaf]
        return lambda expert: stored[expert : expert + 1].to(self.device)[0]

    def _unpacked(self, packed: PackedMatrices, expert: int) -> torch.Tensor:
        return packed.held(slice(expert, expert + 1), self.compute_dtype, self.device)[0].float()

    def towers(self) -> list[Entry]:
        """What a wrapper has besides its text model, as it is stored: a merged model has it unchanged."""
        if self.source.kind == "dummy" or not self.plan.facts.left_out:
            return []
        roots = tuple(f"{kept.path}." for kept in self.plan.facts.left_out)
        if self._originals is not None:
            shapes, tensors = self._originals.shape.shapes, self._originals.tensors
            names = (name for name in shapes if name.startswith(roots))
            return [Entry(name, tensors.dtype(name), shapes[name], partial(tensors.read, name)) for name in names]
        folder = Path(self.source.packed)
        stored = (stored_entries(folder, file, self.sums) for file in sorted(set(tensor_files(folder).values())))
        return [entry for entries in stored for entry in entries if entry.name.startswith(roots)]

    def linear(self, path: str) -> Any:
        """A packed linear, or the packed matrices of experts, with its tensors, which are freed when it is dropped."""
        module = copy.deepcopy(self.model.get_submodule(path))
        fill(module, _At(self._weights, path), device=self.device)
        return module

    def check(self) -> None:
        """Raise ModelError if the folder's contents differ from what was written."""
        self._weights.check()

    def with_new_rows(self, table: torch.Tensor) -> torch.Tensor:
        """A table with rows for new tokens: the mean of the old ones, as in `special_tokens.add_rows`."""
        old, rows = len(table), self.source.vocab_rows
        assert rows is not None  # or it would be no table with new rows
        fresh = sorted({*self.source.new_token_ids, *range(old, rows)})
        kept = torch.tensor(sorted(set(range(old)) - set(fresh)), device=table.device)
        columns = [part[kept].float().mean(dim=0) for part in table.split(_COLUMNS, dim=-1)]
        grown = torch.cat([table, table.new_empty(rows - old, *table.shape[1:])])
        grown[torch.tensor(fresh, device=table.device)] = torch.cat(columns).to(table.dtype)
        return grown

    def identity(self) -> str:
        """Identifies what `read` gives: the run's source, the files read, and what unpacks them."""
        folder = self._originals.folder if self._originals else self.source.packed
        files = source_identity(Path(folder), Packing(bits=16)) if folder else ""
        plan = self.plan
        parts = (plan.source, plan.spec.bits, plan.spec.quant, plan.compute_dtype, files, self.device.type)
        return msgspec.json.encode(parts).decode()

    @cached_property
    def sums(self) -> Sums | None:
        """Expected checksums of the packed tensors; None for random ones, or if none were recorded."""
        return None if self.source.kind == "dummy" else expected_sums(self.source)

    def _weights_of_modules(self) -> Weights:
        if self.source.kind == "dummy":
            return RandomWeights(self.device, self.compute_dtype)
        return FolderWeights(self.source.packed, self.sums)

    def _paths_of_tables(self) -> frozenset[str]:
        """Module paths of the tables with rows for new tokens."""
        if self.source.vocab_rows is None:
            return frozenset()
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return frozenset(path for path, module in self.model.named_modules() if module in tables)

    def _shape(self, path: str, leaf: str, module: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
        if isinstance(module, PackedLinear) and leaf == "weight":
            return module.out_features, module.in_features
        rows = self.source.vocab_rows if path in self.tables else None
        return (rows or parameter.shape[0], *parameter.shape[1:])


class _At:
    """Weights of the modules below a path, by paths relative to it."""

    def __init__(self, weights: Weights, path: str) -> None:
        self._weights, self._path = weights, path

    def of(self, path: str, module: nn.Module) -> Mapping[str, Slices]:
        return self._weights.of(f"{self._path}.{path}".rstrip("."), module)

    def check(self) -> None:
        self._weights.check()


def _on(device: torch.device, read: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    return lambda index: read(index).to(device)


def unpacking_device() -> torch.device:
    """The first GPU with room for a matrix, else the CPU."""
    rooms = enumerate(free_bytes()) if torch.cuda.is_available() else ()
    return next((torch.device("cuda", gpu) for gpu, free in rooms if free >= _GPU_BYTES), torch.device("cpu"))


def _originals(plan: Plan) -> Originals:
    found = find_originals(plan.source)
    if isinstance(found, str):
        raise RunError(found, try_="--onto dequantized")
    return found
