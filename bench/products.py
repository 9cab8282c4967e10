"""How long do a decoder layer's adapted linears take, alone and together, with dropout and without?

    python bench/products.py            # needs a GPU; `--tiny` tries it on a CPU

Forward and backward of the seven NF4 linears of a 7B layer (r = 64, bf16), between stand-ins for attention and
activation. alone: as before linears shared reads. peft: dropout by PEFT, as before it was fused. In milliseconds, the
best of several repeats; the second line of each length is the same captured in a CUDA graph. MiB: what lives between
the forward and the backward pass.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from qdist.core.spec.sections import Quant
from qdist.runtime.adapters.attach import FusedLora, adapt
from qdist.runtime.adapters.sharing import SharedRead
from qdist.runtime.model.packed import Packed4bit
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights

READS = (("q", "k", "v"), ("gate", "up"))
VARIANTS = {
    "alone": (0.0, False), "shared": (0.0, True), "alone, dropout": (0.1, False), "shared, dropout": (0.1, True),
    "peft, dropout": (0.1, False),
}  # fmt: skip


class Layer(nn.Module):
    """The linears of a Llama layer."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        shapes = dict.fromkeys("qkvo", (hidden, hidden)) | {"gate": (hidden, inter), "up": (hidden, inter)}
        for name, shape in (shapes | {"down": (inter, hidden)}).items():
            linear = Packed4bit(*shape, bias=False, dtype=torch.bfloat16, quant=Quant())
            self.add_module(name, linear)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mixed = self.o(self.q(inputs) + self.k(inputs) * self.v(inputs))
        return self.down(functional.silu(self.gate(mixed)) * self.up(mixed))


def made(variant: str, device: torch.device, hidden: int, inter: int) -> Any:
    """An adapted layer in training mode."""
    share, together = VARIANTS[variant]
    layer = Layer(hidden, inter)
    fill(layer, RandomWeights(device, torch.bfloat16), device=device)
    config = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=share, target_modules=[name for name, _ in layer.named_children()]
    )
    adapted: Any = adapt(layer, config)
    for group in READS if together else ():
        members = tuple(adapted.base_model.model.get_submodule(name) for name in group)
        sharing = SharedRead(members)
        for member in members:
            member.sharing, member.constant = sharing, members[0].constant
    if variant.startswith("peft"):
        for module in adapted.modules():
            if isinstance(module, FusedLora):
                module.forward = super(FusedLora, module).forward
    return adapted.to(device).train()


def passes(layer: Any, inputs: torch.Tensor, outer: torch.Tensor) -> None:
    """Forward and backward."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        output = layer(inputs)
    output.backward(outer)


def kept_mib(layer: Any, inputs: torch.Tensor) -> float:
    """Memory between the passes, in MiB; 0 on a CPU."""
    if not inputs.is_cuda:
        return 0.0
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(inputs)
    held = torch.cuda.memory_allocated() - before
    del output
    return held / 2**20


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    """The same step as a CUDA graph."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """The best time of a step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step()
    best = float("inf")
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        for _ in range(5):
            step()
        wait()
        best = min(best, (time.perf_counter() - began) / 5)
    return best * 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = torch.device("cpu" if tiny else "cuda:0")
    hidden, inter, lengths = (128, 256, (32,)) if tiny else (4096, 11008, (8192, 1024, 512))
    print(f"{'tokens':>14}" + "".join(f"{name:>17}" for name in VARIANTS))
    layers = {name: made(name, device, hidden, inter) for name in VARIANTS}
    for tokens in lengths:
        inputs = torch.randn(1, tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        outer = torch.randn(1, tokens, hidden, device=device, dtype=torch.bfloat16) * 1e-3
        rows: dict[str, list[float]] = {"": [], " graph": [], " MiB": []}
        for layer in layers.values():
            step = partial(passes, layer, inputs, outer)
            rows[""].append(milliseconds(step, device, 1 if tiny else 10))
            if not tiny:
                rows[" MiB"].append(kept_mib(layer, inputs))
                rows[" graph"].append(milliseconds(graphed(step), device, 10))
        for kind, values in rows.items():
            print(f"{f'{tokens}{kind}':>14}" + "".join(f"{value:>17.3f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
