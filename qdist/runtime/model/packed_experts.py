"""The frozen matrices of a layer's experts, packed an expert at a time and held as parameters with a row an expert."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from qdist.core.model.storage import MX_BLOCK, Packing, blocks_of
from qdist.core.spec.sections import Quant
from qdist.runtime.formats.packing import pack_experts
from qdist.runtime.kernels import mxfp4
from qdist.runtime.kernels.four_bit import code_book, dequantize_matrices
from qdist.runtime.kernels.grouped import Pairs, has_kernel, looped, products
from qdist.runtime.model.packed import DEVIATION, Slices, empty

_SPREAD = 0.15
"""How far random scales lie from their mean, as a part of it: those of real blocks differ too."""


class Matrices(Protocol):
    """A matrix [out, in] of each expert, whatever holds it."""

    shape: torch.Size
    """As transformers' class has the parameter: [experts, out, in], or [experts, in, out]."""

    def of(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The matrices of some experts: [number, out, in], not always contiguous."""


class PlainMatrices:
    """Matrices of a parameter that is not packed."""

    def __init__(self, parameter: torch.Tensor, *, transposed: bool) -> None:
        """transposed: whether the parameter is [experts, in, out]."""
        self.parameter, self.transposed, self.shape = parameter, transposed, parameter.shape

    def of(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        held = self.parameter[experts].to(device, dtype, non_blocking=True)
        return held.transpose(1, 2) if self.transposed else held


class PackedMatrices(nn.Module):
    """In place of a parameter of an experts' module, under its name; subclasses define the packing.

    Every matrix is packed by itself as the class holds it. Dim 0 of each parameter and buffer is the expert.
    """

    kind: str
    bits: int

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool) -> None:
        """shape: of the parameter. transposed: whether that is [experts, in, out]."""
        super().__init__()
        self.shape, self.transposed = torch.Size(shape), transposed

    def held(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The unpacked parameter of some experts."""
        raise NotImplementedError

    def of(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The matrices of some experts: [number, out, in], not always contiguous."""
        held = self.held(experts, dtype, device)
        return held.transpose(1, 2) if self.transposed else held

    def pack(self, parameter: torch.Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A float parameter as the tensors that this holds, by their names in it. Packed on `device`, from `dtype`."""
        packed = pack_experts((matrix.detach().to(device, dtype) for matrix in parameter), self.packing, device)
        return {suffix.removeprefix("."): values for suffix, values in packed.items()}

    @property
    def packing(self) -> Packing:
        """How the matrices are packed."""
        raise NotImplementedError

    def drawn(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random tensors: bytes of equal probability, and scales that give the weights the deviation `DEVIATION`.

        Packing random weights would say no more, and takes the memory of a whole parameter in 16 bits.
        """
        raise NotImplementedError

    def stored(self, file: Mapping[str, Slices], name: str) -> dict[str, Slices]:
        """The tensors as folders store them. file: of the experts' module, by names in it. name: the parameter's."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        return {part: file[f"{name}.{part}"] for part, _ in tensors}

    def _at(self, values: torch.Tensor, experts: slice, device: torch.device) -> torch.Tensor:
        return values[experts].to(device, non_blocking=True)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, {self.kind}"


class Matrices4bit(PackedMatrices):
    """NF4 or FP4 in blocks of 64, with or without quantized absmaxes, as bitsandbytes packs each matrix alone."""

    bits = 4

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool, quant: Quant) -> None:
        super().__init__(shape, transposed=transposed)
        self.quant, self.kind = quant, quant.type
        count, weights = shape[0], shape[1] * shape[2]
        blocks, nested_blocks = blocks_of(weights)
        self.weight = empty((count, (weights + 1) // 2), torch.uint8)
        self.absmax = empty((count, blocks), torch.uint8 if quant.double else torch.float32)
        if quant.double:  # a 32,768th of the weights: whole on every rank
            self.register_buffer("nested_absmax", torch.empty(count, nested_blocks, device="meta"), persistent=False)
            self.register_buffer("nested_offset", torch.empty(count, device="meta"), persistent=False)

    def held(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        weight, absmax = self._at(self.weight, experts, device), self._at(self.absmax, experts, device)
        nested = None
        if self.quant.double:
            nested = (self._at(self.nested_absmax, experts, device), self._at(self.nested_offset, experts, device))
        shape = (len(weight), self.shape[1], self.shape[2])
        return dequantize_matrices(weight, absmax, nested, quant_type=self.quant.type, shape=shape, dtype=dtype)

    @property
    def packing(self) -> Packing:
        return Packing(bits=4, type=self.quant.type, double=self.quant.double)

    def drawn(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        device = generator.device
        mean = DEVIATION / float(code_book(self.quant.type, device).square().mean().sqrt())
        tensors = {"weight": _random_bytes(self.weight, generator)}
        if not self.quant.double:
            return tensors | {"absmax": _near(mean, self.absmax, generator)}
        return tensors | {
            "absmax": _random_bytes(self.absmax, generator),
            "nested_absmax": torch.full(self.nested_absmax.shape, _SPREAD * mean, device=device),
            "nested_offset": torch.full(self.nested_offset.shape, mean, device=device),
        }


class Matrices8bit(PackedMatrices):
    """A byte per weight and a scale per row of a matrix as the class holds it, as bitsandbytes packs for LLM.int8.

    Unpacked to 16 bits and multiplied there: the product of bytes, with outliers apart, is for one matrix at a time.
    """

    kind, bits = "int8", 8

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool) -> None:
        super().__init__(shape, transposed=transposed)
        self.weight = empty(shape, torch.int8)
        self.scale = empty(shape[:2], torch.float32)
        """The largest magnitude of each row; bitsandbytes' SCB."""

    def held(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        scale = self._at(self.scale, experts, device).unsqueeze(-1).mul(1.0 / 127.0)
        return self._at(self.weight, experts, device).to(dtype, copy=True).mul_(scale)

    @property
    def packing(self) -> Packing:
        return Packing(bits=8)

    def drawn(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        weight = torch.empty(self.weight.shape, dtype=torch.int8, device=generator.device)
        weight.random_(-127, 128, generator=generator)
        uniform = (127 * 128 / 3) ** 0.5  # deviation of these integers
        return {"weight": weight, "scale": _near(DEVIATION * 127 / uniform, self.scale, generator)}


class MatricesMxfp4(PackedMatrices):
    """MXFP4 as gpt-oss' checkpoints have it: [experts, out, in] whatever the class holds, in blocks of 32 inputs."""

    kind, bits = "mxfp4", 4

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool) -> None:
        super().__init__(shape, transposed=transposed)
        inputs, outputs = (shape[1], shape[2]) if transposed else (shape[2], shape[1])
        groups = inputs // MX_BLOCK
        self.blocks = empty((shape[0], outputs, groups, MX_BLOCK // 2), torch.uint8)
        self.scales = empty((shape[0], outputs, groups), torch.uint8)

    def of(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        blocks, scales = self._at(self.blocks, experts, device), self._at(self.scales, experts, device)
        return mxfp4.dequantize(blocks, scales, dtype)

    def held(self, experts: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        matrices = self.of(experts, dtype, device)
        return matrices.transpose(1, 2) if self.transposed else matrices

    def drawn(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # Of values with a root mean square of 2.87, powers around 2 to the -7 give a deviation near 0.02.
        scales = torch.empty(self.scales.shape, dtype=torch.uint8, device=generator.device)
        scales.random_(mxfp4.BIAS - 8, mxfp4.BIAS - 6, generator=generator)
        return {"blocks": _random_bytes(self.blocks, generator), "scales": scales}

    def stored(self, file: Mapping[str, Slices], name: str) -> dict[str, Slices]:
        return {part: file[f"{name}_{part}"] for part, _ in self.named_parameters()}


def packed_matrices(
    shape: tuple[int, int, int], *, transposed: bool, bits: int, quant: Quant, mxfp4: bool = False
) -> PackedMatrices:
    """An empty module for the matrices of a parameter [experts, out, in], or [experts, in, out] if `transposed`.

    bits: 4 or 8. mxfp4: they come in that, and stay.
    """
    if mxfp4:
        return MatricesMxfp4(shape, transposed=transposed)
    if bits == 4:
        return Matrices4bit(shape, transposed=transposed, quant=quant)
    return Matrices8bit(shape, transposed=transposed)


def expert_products(rows: torch.Tensor, matrices: Matrices, pairs: Pairs) -> torch.Tensor:
    """rows [pairs, in] times the transposed matrix of each one's expert: [pairs, out].

    Unpacks all matrices where one kernel multiplies them, and elsewhere one at a time, of experts with rows.
    """
    return _products(rows, matrices, pairs, transposed=True)


def expert_gradients(gradient: torch.Tensor, matrices: Matrices, pairs: Pairs) -> torch.Tensor:
    """The gradient of the rows of `expert_products`, [pairs, in], from that of its result, [pairs, out]."""
    return _products(gradient, matrices, pairs, transposed=False)


def _products(rows: torch.Tensor, matrices: Matrices, pairs: Pairs, *, transposed: bool) -> torch.Tensor:
    def unpacked(experts: slice) -> torch.Tensor:
        found = matrices.of(experts, rows.dtype, rows.device)
        return found.transpose(1, 2) if transposed else found

    if has_kernel(rows, *matrices.shape[1:]):
        return products(rows, unpacked(slice(None)), pairs)
    width = sum(matrices.shape[1:]) - rows.shape[1]
    return looped(rows, ((span, unpacked(slice(span.group, span.group + 1))[0]) for span in pairs.occupied), width)


def _random_bytes(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(like.shape, dtype=torch.uint8, device=generator.device)
    return values.random_(0, 256, generator=generator)


def _near(mean: float, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Float32 numbers around a mean, of the shape of another tensor."""
    spread = torch.rand(like.shape, device=generator.device, generator=generator)
    return spread.mul_(2 * _SPREAD).add_(1 - _SPREAD).mul_(mean)
