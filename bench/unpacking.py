"""Time of one frozen linear, part by part, packed by NF4 and by GPTQ: `python bench/unpacking.py`.

Unpacking, and the products with the unpacked weights that training needs, in the shapes of a 7B Llama. A GPU's clock
falls and rises, so all parts are timed in turn, many times over, and the median counts.
"""

import argparse
import itertools
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from qdist.core.model.gptq import Shape
from qdist.core.spec.sections import Quant
from qdist.runtime.model.packed import Packed4bit, PackedLinear
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights

SHAPES = {"qkv, o": (4096, 4096), "gate, up": (4096, 11008), "down": (11008, 4096)}
"""Inputs and outputs."""
COUNTS = {"qkv, o": 4, "gate, up": 2, "down": 1}
"""Of each in a decoder layer."""


def main() -> None:
    """Print microseconds for each linear and part, and their sums for a decoder layer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--group-size", type=int, default=128)
    given = parser.parse_args()
    device = torch.device("cuda", 0)
    parts: dict[tuple[str, str, str], Callable[[], object]] = {}
    for name, (inputs, outputs) in SHAPES.items():
        x = torch.randn(given.tokens, inputs, device=device, dtype=torch.bfloat16)
        y = torch.randn(given.tokens, outputs, device=device, dtype=torch.bfloat16)
        for method, layer in layers(inputs, outputs, given.group_size).items():
            fill(nn.ModuleDict({"linear": layer}), RandomWeights(device, torch.bfloat16), device=device)
            matrix = layer.matrix(torch.bfloat16, device)
            parts |= {
                (name, method, "unpack"): lambda layer=layer: layer.matrix(torch.bfloat16, device),
                (name, method, "forward"): lambda x=x, matrix=matrix: x @ matrix.t(),
                (name, method, "backward"): lambda y=y, matrix=matrix: y @ matrix,
            }
    times = {part: list[float]() for part in parts}
    for _ in range(given.rounds):
        for part, work in parts.items():
            times[part].append(seconds(work))
    print(f"microseconds, {given.tokens} tokens, bfloat16, {torch.cuda.get_device_name(device)}")
    print(f"{'linear':10} {'packed':8} {'unpack':>8} {'GB/s':>7} {'forward':>8} {'backward':>8}")
    for (name, (inputs, outputs)), method in itertools.product(SHAPES.items(), ("nf4", "gptq")):
        unpack, forward, backward = (
            1e6 * median(times[name, method, part]) for part in ("unpack", "forward", "backward")
        )
        rate = 2.5 * inputs * outputs / unpack / 1e3
        print(f"{name:10} {method:8} {unpack:8.1f} {rate:7.0f} {forward:8.1f} {backward:8.1f}")
    for method in ("nf4", "gptq"):
        sums = {
            part: sum(1e6 * COUNTS[name] * median(times[name, method, part]) for name in SHAPES)
            for part in ("unpack", "forward", "backward")
        }
        whole = 3 * sums["unpack"] + 2 * sums["forward"] + sums["backward"]
        print(f"a decoder layer, {method}: " + ", ".join(f"{part} {value:.0f}" for part, value in sums.items())
              + f"; recomputed, 3 x unpack + 2 x forward + backward: {whole:.0f}")  # fmt: skip


def layers(inputs: int, outputs: int, group_size: int) -> dict[str, PackedLinear]:
    """The linear, packed both ways."""
    shape = {"bias": False, "dtype": torch.bfloat16}
    return {
        "nf4": Packed4bit(inputs, outputs, quant=Quant(), **shape),
        "gptq": PackedGptq(inputs, outputs, shape=Shape(4, group_size), offset=1, **shape),
    }


def seconds(work: Callable[[], object]) -> float:
    """Of the GPU, for one of ten in a row, which it is told before it is free to begin."""
    torch.cuda._sleep(5_000_000)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


if __name__ == "__main__":
    main()
