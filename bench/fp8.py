"""Products of a 4-bit backbone in bfloat16, fp8 and int8, part by part, and their errors: `python bench/fp8.py`.

Shapes of a 7B and a 65B Llama. A part is timed ten times in a row behind work that keeps the GPU busy, all parts in
turn; the median of three rounds counts. Errors are against float32 products of the unpacked weights, and activations
have outliers in four channels. `--tiny` runs one small shape on the CPU under TRITON_INTERPRET=1.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from unpacking import layers, seconds

from qdist.runtime.kernels.fp8 import ones, quantize_tokens, triton_quantize_tokens, triton_row_scales, triton_unpack
from qdist.runtime.model.packed import PackedLinear
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights

SHAPES = {
    "7b q, o": (4096, 4096, 8192, 1024), "7b gate, up": (4096, 11008, 8192, 1024),
    "7b down": (11008, 4096, 8192, 1024), "65b q, o": (8192, 8192, 4096), "65b gate, up": (8192, 22016, 4096),
}  # fmt: skip
"""Inputs and outputs, and counts of tokens."""
TINY = {"tiny": (128, 192, 32)}
OUTLIERS, OUTLIER = 4, 20.0
"""Channels of the activations that are this much larger."""
ROUNDS = 3
Parts = dict[str, Callable[[], object]]


@triton.jit
def scale_sums(sums, left, right, out, outputs, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 sums [tokens, outputs] times a scale a token and a scale an output."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < outputs
    value = tl.load(sums + row * outputs + column, mask=there, other=0).to(tl.float32)
    value = value * tl.load(left + row) * tl.load(right + column, mask=there, other=0.0)
    tl.store(out + row * outputs + column, value.to(out.dtype.element_ty), mask=there)


class Bf16:
    """What training does without a setting."""

    name = "bf16"

    def __init__(self, layer: PackedLinear, device: torch.device) -> None:
        self.layer, self.device = layer, device

    def unpack(self, *, transposed: bool) -> Any:
        return self.layer.matrix(torch.bfloat16, self.device)

    def quantize(self, given: torch.Tensor, weights: Any) -> Any:
        """weights: unpacked, if their scales go into what is quantized."""
        return given

    def multiply(self, left: Any, weights: Any, *, transposed: bool) -> torch.Tensor:
        return left @ (weights if transposed else weights.t())


class Fp8(Bf16):
    """The product's own way."""

    name, fast = "fp8", True

    def unpack(self, *, transposed: bool) -> Any:
        return self.layer.in_fp8(self.device, transposed=transposed)

    def quantize(self, given: torch.Tensor, weights: Any) -> Any:
        return quantize_tokens(given, None if weights is None else weights.scale)

    def multiply(self, left: Any, weights: Any, *, transposed: bool) -> torch.Tensor:
        scale = ones(len(weights.values), self.device) if transposed else weights.scale
        product: torch.Tensor = torch._scaled_mm(
            left.values, weights.values.t(), scale_a=left.scale.unsqueeze(1), scale_b=scale.unsqueeze(0),
            out_dtype=torch.bfloat16, use_fast_accum=self.fast,
        )  # fmt: skip
        return product


class Fp8Exact(Fp8):
    """With every sum in 32 bits: tensor cores of Hopper keep fewer for fp8 otherwise."""

    name, fast = "fp8, 32-bit sums", False


class Int8(Bf16):
    """W4A8 through torch's int8 product."""

    name = "int8"

    def __init__(self, layer: PackedLinear, device: torch.device) -> None:
        super().__init__(layer, device)
        self.scale = triton_row_scales(layer.tensors_on(device), dtype=torch.int8)

    def unpack(self, *, transposed: bool) -> Any:
        return triton_unpack(self.layer.tensors_on(self.device), self.scale, transposed=transposed, dtype=torch.int8)

    def quantize(self, given: torch.Tensor, weights: Any) -> Any:
        return triton_quantize_tokens(given, None if weights is None else weights.scale, dtype=torch.int8)

    def multiply(self, left: Any, weights: Any, *, transposed: bool) -> torch.Tensor:
        sums = torch._int_mm(left.values, weights.values.t())
        return scaled_sums(sums, left.scale, ones(sums.shape[1], self.device) if transposed else weights.scale)


def scaled_sums(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int32 sums [tokens, outputs] times a scale a token and a scale an output, bfloat16."""
    tokens, outputs = sums.shape
    out = torch.empty((tokens, outputs), dtype=torch.bfloat16, device=sums.device)
    scale_sums[(tokens, -(-outputs // 2048))](sums, left, right, out, outputs, COLUMNS=2048, num_warps=8)
    return out


def main() -> None:
    """Print milliseconds and errors of each product, and what a decoder layer's seven linears take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="one small shape, for a look at the table")
    given = parser.parse_args()
    device = torch.device("cpu") if given.tiny else torch.device("cuda", 0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"milliseconds, {'CPU' if given.tiny else torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"{'':36}|{'forward':^31}|{'backward':^31}|{'error %, cosine':^31}")
    print(
        f"{'linear':13}{'tokens':>6}  {'arithmetic':15}|" + f"{'all':>8}{'unpack':>8}{'quant':>7}{'mm':>8}|" * 2
        + f"{'output':>16}{'gradient':>15}"
    )  # fmt: skip
    for name, (inputs, outputs, *counts) in (TINY if given.tiny else SHAPES).items():
        made = filled(inputs, outputs, device)
        for tokens in counts:
            for row in rows(made, tokens, device, rounds=1 if given.tiny else ROUNDS):
                print(f"{name:13}{tokens:6}  {row}", flush=True)


def filled(inputs: int, outputs: int, device: torch.device) -> list[Bf16]:
    """The ways to multiply with one linear, packed by NF4 and by GPTQ."""
    made = layers(inputs, outputs, 128)
    for layer in made.values():
        fill(nn.ModuleDict({"linear": layer}), RandomWeights(device, torch.bfloat16), device=device)
    nf4, gptq = made["nf4"], made["gptq"]
    ways = [Bf16(nf4, device), Fp8(nf4, device), Fp8Exact(nf4, device), Int8(nf4, device)]
    for way in (Bf16(gptq, device), Fp8(gptq, device)):
        way.name = f"gptq, {way.name}"
        ways.append(way)
    return ways


def rows(ways: list[Bf16], tokens: int, device: torch.device, *, rounds: int) -> Iterator[str]:
    """A row of the table for each way."""
    layer = ways[0].layer
    x, y = activations(tokens, layer.in_features, device), gradients(tokens, layer.out_features, device)
    parts = [parts_of(way, x, y) for way in ways]
    times = [{part: list[float]() for part in own} for own in parts]
    timed = seconds if device.type == "cuda" else seconds_on_cpu
    for _ in range(rounds):
        for own, found in zip(parts, times, strict=True):
            for part, work in own.items():
                found[part].append(timed(work))
    for way, own, found in zip(ways, parts, times, strict=True):
        exact = way.layer.matrix(torch.bfloat16, device).float()
        wanted = x.float() @ exact.t(), y.float() @ exact
        errors = [error(own[part](), each) for part, each in zip(("forward", "backward"), wanted, strict=True)]
        shown = "".join(
            f"{1e3 * median(found[part]):{width}.3f}" + ("|" if part.endswith("mm") else "")
            for part, width in zip(own, (8, 8, 7, 8) * 2, strict=True)
        )
        yield f"{way.name:15}|{shown}{errors[0]}{errors[1]}"


def parts_of(way: Bf16, x: torch.Tensor, y: torch.Tensor) -> Parts:
    """Both passes, whole and apart."""
    there, back = (way.unpack(transposed=transposed) for transposed in (False, True))
    given, outer = way.quantize(x, None), way.quantize(y, back)

    def forward() -> torch.Tensor:
        return way.multiply(way.quantize(x, None), way.unpack(transposed=False), transposed=False)

    def backward() -> torch.Tensor:
        weights = way.unpack(transposed=True)
        return way.multiply(way.quantize(y, weights), weights, transposed=True)

    return {
        "forward": forward, "unpack": partial(way.unpack, transposed=False), "quantize": partial(way.quantize, x, None),
        "mm": partial(way.multiply, given, there, transposed=False),
        "backward": backward, "back unpack": partial(way.unpack, transposed=True),
        "back quantize": partial(way.quantize, y, back), "back mm": partial(way.multiply, outer, back, transposed=True),
    }  # fmt: skip


def activations(tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, a few channels of them much larger, as in language models."""
    values = torch.randn(tokens, width, device=device)
    values[:, torch.linspace(3, width - 5, OUTLIERS).long()] *= OUTLIER
    return values.bfloat16()


def gradients(tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Of the size of a loss's, heavy-tailed over tokens and channels."""
    values = torch.randn(tokens, width, device=device) * torch.randn(tokens, width, device=device).abs()
    return (values * torch.randn(tokens, 1, device=device).exp() * 1e-6).bfloat16()


def error(found: Any, wanted: torch.Tensor) -> str:
    """Relative error in percent, and cosine."""
    value = found.float()
    cosine = torch.dot(value.flatten(), wanted.flatten()) / (value.norm() * wanted.norm())
    return f"{100 * float((value - wanted).norm() / wanted.norm()):7.2f} {float(cosine):.5f}"


def seconds_on_cpu(work: Callable[[], object]) -> float:
    """Of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
