"""Sources of a backbone's tensors: a folder of safetensors read through mmap, or random numbers by name."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdist.core.errors import ModelError
from qdist.host.opening import told
from qdist.runtime.formats.checksum import SumCheck, Sums
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.model.packed import DEVIATION, PackedLinear, Slices
from qdist.runtime.model.packed_experts import PackedMatrices

_COPIED_ELEMENTS = 1 << 18
"""Elements up to which a tensor is copied out of its file: otherwise each would keep the whole file mapped, and 64 KiB
around what it touches resident. SmolLM2's 630 scales took 33 MiB of every rank that way."""


class Weights(Protocol):
    """Tensors by module; each reader takes the part it owns."""

    def of(self, path: str, module: nn.Module) -> Mapping[str, Slices]:
        """The parameters and buffers of a module itself, without submodules, by their names in it."""

    def check(self) -> None:
        """Verify what was read so far against its checksums. Collective if a tensor is sharded.

        Raises ModelError naming a tensor that is not what it was.
        """


class Stored:
    """A lazily read tensor in a file. What is read is summed on its target device."""

    def __init__(self, part: Any, file: Path, name: str, check: SumCheck) -> None:
        """part: safetensors' slice of the tensor."""
        self._part, self._file, self._name, self._check = part, file, name, check

    @property
    def elements(self) -> int:
        return prod(self._part.get_shape())

    def __getitem__(self, rows: slice) -> torch.Tensor:
        values: torch.Tensor = self._part[rows if self._part.get_shape() else ...]  # a single number has no rows
        if rows == slice(None):
            self._check.add(self._file, self._name, values)
        return values

    def to(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor."""
        values: torch.Tensor = self._part[:]
        if values.dtype != dtype:
            return self[:].to(device, dtype)
        values = values.to(device)
        self._check.add(self._file, self._name, values)
        return values

    def fill_part(self, part: torch.Tensor, first: int, group: Any) -> None:
        """Fill `part` [n], elements of the flattened tensor from `first` on; only their rows are read.

        group: the ranks with the other elements; all call, even for none.
        """
        row = prod(self._part.get_shape()[1:])
        begin, end = first // row, -(-(first + len(part)) // row) if len(part) else 0
        rows: torch.Tensor = self._part[begin : max(begin, end)]
        values = rows.reshape(-1)[first - begin * row :][: len(part)]
        part.copy_(values)
        summed = part if values.dtype == part.dtype else values.to(part.device)
        first_byte = first * values.element_size()
        self._check.add(self._file, self._name, summed, first_byte=first_byte, group=group, is_whole=False)


class ModelWeights:
    """Another model's unpacked weights, by the same modules. Matrices are packed here, on `device`, one at a time."""

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype

    def of(self, path: str, module: nn.Module) -> Mapping[str, Slices]:
        if isinstance(module, PackedMatrices):
            return module.pack(self.model.get_parameter(path), self.device, self.dtype)
        plain = self.model.get_submodule(path)
        tensors: dict[str, Any] = {**dict(plain.named_parameters(recurse=False)), **stored_buffers(plain)}
        if isinstance(plain, Conv1D):  # [inputs, outputs], and a linear in its place
            tensors["weight"] = tensors["weight"].detach().t().contiguous()
        if isinstance(module, PackedLinear):
            tensors |= module.pack(tensors["weight"].detach().to(self.device, self.dtype))
        return tensors

    def check(self) -> None:
        """Nothing to check: whoever loaded the model did."""


class FolderWeights:
    """A folder of safetensors under module names, linears packed as bitsandbytes stores them; see `qdist quantize`."""

    def __init__(self, folder: str | Path, sums: Sums | None = None, *, share: tuple[int, int] = (0, 1)) -> None:
        """sums: expected checksums of its tensors. share: see `SumCheck`."""
        self.folder, self._check = Path(folder), SumCheck(sums, share=share)
        self._open: tuple[Path, Any] | None = None
        """The file that was read last, which holds a layer; opening it for each tensor took longer than reading."""
        self._closing = ExitStack()

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of each tensor."""
        return tensor_files(self.folder)

    def of(self, path: str, module: nn.Module) -> Mapping[str, Slices]:
        if isinstance(module, PackedMatrices):
            experts, _, parameter = path.rpartition(".")
            return module.stored(_Prefixed(self, experts), parameter)
        file = _Prefixed(self, path)
        if not isinstance(module, PackedLinear):
            return {**file, "weight": _Transposed(file["weight"])} if is_transposed(module) else file
        tensors = module.stored(file)
        if module.bias is not None:
            tensors["bias"] = file["bias"]
        return tensors

    def check(self) -> None:
        self._close()
        self._check.finish()

    def _close(self) -> None:
        self._open = None
        self._closing.close()

    def _handle(self, file: Path) -> Any:
        """A file's handle, which stays open until another file is read: its pages count as this process's memory."""
        if self._open is None or self._open[0] != file:
            self._close()
            self._open = file, self._closing.enter_context(opened(file))
        return self._open[1]

    def open(self, name: str) -> Slices:
        """A tensor, read lazily unless small. Raises ModelError if there is none."""
        if name not in self.files:
            raise ModelError(f"{self.folder} has no tensor {name}", try_="another folder, or pack the model again")
        place = self.folder / self.files[name]
        handle = self._handle(place)
        with told(str(place), ModelError, try_="download or pack the model again"):
            tensor = Stored(handle.get_slice(name), place, name, self._check)
            return tensor[:].clone() if tensor.elements <= _COPIED_ELEMENTS else tensor


def whole(tensor: Slices) -> torch.Tensor:
    """All rows of a tensor, which may be a single number."""
    return tensor if isinstance(tensor, torch.Tensor) else tensor[:]


def stored_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of a module itself that are part of a checkpoint, such as the bias by which routers choose experts."""
    buffers = dict(module.named_buffers(recurse=False))
    stored = module.state_dict() if buffers else {}
    return {name: value for name, value in buffers.items() if name in stored}


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stands for a `Conv1D`, whose weights in 16 bits are stored as [inputs, outputs]."""
    return bool(getattr(module, "is_transposed", False)) and isinstance(module, nn.Linear)


class _Transposed:
    """A matrix that is stored as [inputs, outputs], by rows of [outputs, inputs]."""

    def __init__(self, stored: Slices) -> None:
        self._stored = stored

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._stored[:].t()[rows].contiguous()


class _Prefixed(Mapping[str, Slices]):
    """The tensors of one module by their names in it, opened on access."""

    def __init__(self, folder: FolderWeights, path: str) -> None:
        self._folder, self._path = folder, path

    def __getitem__(self, name: str) -> Slices:
        return self._folder.open(f"{self._path}.{name}")

    def __contains__(self, name: object) -> bool:
        return f"{self._path}.{name}" in self._folder.files

    def __iter__(self) -> Iterator[str]:
        prefix = f"{self._path}."
        return (name.removeprefix(prefix) for name in self._folder.files if name.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RandomWeights:
    """Matrices are N(0, 0.02), norms 1, biases 0: activations stay finite however deep the model.

    A tensor depends on its name alone, so any rank can make any part of the same model.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def of(self, path: str, module: nn.Module) -> Mapping[str, Slices]:
        if isinstance(module, PackedMatrices):
            return module.drawn(self._generator(path))
        tensors: dict[str, Any] = {}
        if isinstance(module, PackedLinear):
            name, shape = f"{path}.weight", (module.out_features, module.in_features)
            tensors |= module.drawn(partial(self._matrix, name, shape), self._generator(name))
        for name, parameter in module.named_parameters(recurse=False):
            if name not in tensors:
                tensors[name] = self._values(f"{path}.{name}", tuple(parameter.shape))
        return tensors

    def check(self) -> None:
        """Nothing to check: the values are generated from names."""

    def _values(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=self.device)
        return self._matrix(name, shape)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(0.0, DEVIATION, generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        return torch.Generator(self.device).manual_seed(seed)
