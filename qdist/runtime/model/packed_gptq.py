"""A frozen linear with weights packed as in GPTQ checkpoints (Frantar et al. 2022)."""

from collections.abc import Callable, Mapping

import torch

from qdist.core.model.gptq import Shape, WeightOffset
from qdist.runtime.kernels import fp8
from qdist.runtime.kernels import gptq_bits as packing
from qdist.runtime.kernels.gptq import FEW_TOKENS, dequantize, triton_product
from qdist.runtime.kernels.pooling import add_pooled_gradient, means
from qdist.runtime.model.packed import DEVIATION, PackedLinear, Slices, empty, is_offloaded


class PackedGptq(PackedLinear):
    """2, 3, 4 or 8 bits; a scale and a zero per group of inputs. The file's bytes are the parameters.

    offset: what is added to stored zeros: 1 in the format gptq, 0 in gptq_v2.
    ordered: groups are of scattered inputs, and `g_idx` says which.
    shift: of a merged QA-LoRA adapter, what is added to the weights of a group. Products add it times pooled inputs: in
    the weights it would be lost when they are rounded to 16 bits.
    """

    kind = "gptq"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        shape: Shape,
        offset: int,
        ordered: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        shift: WeightOffset | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.shape, self.offset, self.shift, self.bits = shape, offset, shift, shape.bits
        sizes = shape.tensors(in_features, out_features)
        self.weight = empty(sizes["qweight"], torch.int32)
        self.qzeros = empty(sizes["qzeros"], torch.int32)
        self.scales = empty(sizes["scales"], scale_dtype)
        index = torch.empty(in_features, dtype=torch.int32, device="meta") if ordered else None
        self.register_buffer("g_idx", index, persistent=False)
        if shift is not None:
            shape_of_offsets = (in_features // shift.group_size, out_features)
            self.weight_offset = empty(shape_of_offsets, getattr(torch, shift.dtype))

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._unpacked(dtype, device).t()

    def _unpacked(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Unpacked weights, [in_features, out_features], in the order of the words."""
        weight, qzeros, scales = (self._at(value, device) for value in (self.weight, self.qzeros, self.scales))
        return dequantize(
            weight, qzeros, scales, self.g_idx, bits=self.shape.bits, offset=self.offset,
            group_size=self.shape.group_size, dtype=dtype,
        )  # fmt: skip

    def find_row_scales(self, device: torch.device) -> torch.Tensor:
        """From the scales alone: a stored weight and its zero differ by less than their range, and an offset of 1."""
        return fp8.scale_of(self._at(self.scales, device).float().abs().amax(0) * (1 << self.shape.bits))

    @staticmethod
    def _at(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        return value if value.device == device else value.to(device, non_blocking=True)

    def product(self, inputs: torch.Tensor, quantized: fp8.Scaled | None = None) -> torch.Tensor:
        product = self._packed_product(inputs, quantized)
        if self.shift is not None:
            size = self.shift.group_size
            product.addmm_(means(inputs, size), self._offsets(inputs), alpha=self.shift.scale * size)
        return product

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        inputs = super().input_gradient(gradient)
        self._add_shift_gradient(gradient, inputs)
        return inputs

    def add_input_gradient(self, gradient: torch.Tensor, total: torch.Tensor) -> None:
        super().add_input_gradient(gradient, total)
        self._add_shift_gradient(gradient, total)

    def _add_shift_gradient(self, gradient: torch.Tensor, total: torch.Tensor) -> None:
        """Add what offsets contribute to the gradient of the inputs."""
        if self.shift is None:
            return
        # The scale belongs inside the product: stored offsets are large, and the product would leave float16.
        none, offsets = gradient.new_zeros(1), self._offsets(gradient).t()
        groups = torch.addmm(none, gradient, offsets, beta=0, alpha=self.shift.scale)
        add_pooled_gradient(total, groups, self.shift.group_size)

    def _offsets(self, like: torch.Tensor) -> torch.Tensor:
        """Offsets [in / group_size, out], to be multiplied by the scale."""
        return self.weight_offset.to(like.device, like.dtype, non_blocking=True)

    def _packed_product(self, inputs: torch.Tensor, quantized: fp8.Scaled | None) -> torch.Tensor:
        if not inputs.is_cuda or inputs.shape[0] > FEW_TOKENS or is_offloaded(self):
            return super().product(inputs, quantized)
        product = triton_product(
            inputs, self.weight, self.qzeros, self.scales, self.g_idx, bits=self.shape.bits, offset=self.offset,
            group_size=self.shape.group_size,
        )  # fmt: skip
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def unpacked(self, device: torch.device) -> torch.Tensor:
        weights = super().unpacked(device)
        if self.shift is not None:
            offsets = self._offsets(weights) * self.shift.scale
            weights.view(self.out_features, -1, self.shift.group_size).add_(offsets.t().unsqueeze(-1))
        return weights

    def drawn(self, matrix: Callable[[], torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random words with uniform bits, and scales that give the weights the standard deviation `DEVIATION`.

        Rounding a random matrix would say no more, and takes five times a layer's memory. Scales differ as those of
        groups do: products of numbers with few bits set take a GPU less power, and it would be too fast.
        """
        assert self.shift is None  # a merged checkpoint is read, never made of random weights
        bits, device = self.shape.bits, generator.device
        words = torch.empty(self.weight.shape, dtype=torch.int32, device=device)
        words.random_(-(1 << 31), 1 << 31, generator=generator)
        groups = tuple(self.scales.shape)
        zeros = torch.full(groups, 1 << (bits - 1), dtype=torch.int32, device=device)
        scales = torch.rand(groups, device=device, generator=generator).mul_(0.3).add_(0.85)
        scales.mul_(DEVIATION / ((4**bits - 1) / 12) ** 0.5)
        tensors = {
            "weight": words,
            "qzeros": packing.pack_zeros(zeros, bits, self.offset),
            "scales": scales.to(self.scales.dtype),
        }
        if self.g_idx is not None:
            tensors["g_idx"] = packing.group_of_inputs(self.in_features, self.shape.group_size, device)
        return tensors

    def stored(self, file: Mapping[str, Slices]) -> dict[str, Slices]:
        tensors = {"weight": file["qweight"], "qzeros": file["qzeros"], "scales": file["scales"]}
        if self.g_idx is not None:
            tensors["g_idx"] = file["g_idx"]
        if self.shift is not None:
            tensors["weight_offset"] = file["weight_offset"]
        return tensors
