"""How long does the update of an adapter take: waiting for the norm, without a wait, and in a CUDA graph?

    python bench/update.py [--layers 32] [--rank 64]

The matrices of llama-7b's adapter with random gradients, norm 0.3 at most. Milliseconds of a step, waited for; how far
the parameters are after five steps from those of the first row. A CPU has no row for graphs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.runtime.engine.adamw import build_optimizer
from qdist.runtime.engine.torch import Adapter, TorchEngine

_STEPS, _WARM = 25, 5
_RATE = 1e-4


class Row(NamedTuple):
    """A way to update, and what it took."""

    name: str
    milliseconds: float
    parameters: list[torch.Tensor]


def main() -> None:
    """Measure every way and print the table."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--layers", type=int, default=32)
    given.add_argument("--rank", type=int, default=64)
    args = given.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes_of(args.layers, args.rank)
    print(f"{len(shapes)} matrices, {sum(rows * columns for rows, columns in shapes) / 1e6:.1f} M parameters, {device}")
    ways: list[tuple[str, dict[str, Any], bool]] = [
        ("waits for the norm", {}, False),
        ("without a wait", {"capturable": True}, False),
        ("without a wait, flat gradients", {"capturable": True, "graphs": True}, False),
        ("in a CUDA graph, flat gradients", {"capturable": True, "graphs": True}, True),
        ("adamw-8bit", {"name": "adamw-8bit"}, False),
    ]
    able = [way for way in ways if device.type == "cuda" or not way[2]]
    rows = [measure(label, shapes, device, graph=graph, **how) for label, how, graph in able]
    print(f"{'update':34} {'ms':>8} {'furthest':>10}")
    for row in rows:
        away = max(float((a - b).abs().max()) for a, b in zip(row.parameters, rows[0].parameters, strict=True))
        print(f"{row.name:34} {row.milliseconds:8.3f} {away:10.1e}")


def shapes_of(layers: int, rank: int) -> list[tuple[int, int]]:
    """Shapes of A and B beside every linear of so many layers of llama-7b."""
    (shape,) = from_config(config_of("llama-7b"), name="llama-7b").shapes
    one = [each for linear in shape.linears for each in ((rank, linear.inputs), (linear.outputs, rank))]
    return one * layers


def measure(label: str, shapes: list[tuple[int, int]], device: torch.device, *, graph: bool = False, **how: Any) -> Row:
    """Median milliseconds of a step, and the parameters after the first five."""
    engine, gradients = engine_of(shapes, device, **how)
    step: Callable[[], object] = partial(engine.step, _RATE, 1.0)
    taken, after = [], []
    for number in range(_WARM + _STEPS):
        give(engine, gradients)
        if number == 1 and graph:
            step = captured(engine)
            give(engine, gradients)
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
        if number == _WARM - 1:
            after = [parameter.detach().cpu() for parameter in engine.adapter.parameters()]
    return Row(label, sorted(taken[_WARM:])[_STEPS // 2], after)


def engine_of(
    shapes: list[tuple[int, int]],
    device: torch.device,
    *,
    name: str = "adamw",
    capturable: bool = False,
    graphs: bool = False,
) -> tuple[TorchEngine, list[torch.Tensor]]:
    """An engine over matrices of these shapes, and what their gradients are at every step."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes)
    gradients = [torch.randn(shape, device=device) for shape in shapes]
    adapter = Adapter(model, lambda batch: torch.zeros(()))
    optimizer = build_optimizer(
        adapter.named(), name=name, fused=True, capturable=capturable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    return TorchEngine(adapter, optimizer, clip=0.3, graphs=graphs), gradients


def give(engine: TorchEngine, gradients: list[torch.Tensor]) -> None:
    """Gradients as a backward pass leaves them: copies, as they are unscaled in place."""
    for parameter, gradient in zip(engine.adapter.parameters(), gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad.copy_(gradient)


def captured(engine: TorchEngine) -> Callable[[], object]:
    """The update as a graph, whose moments are there from the first step."""
    update, flat, graph = engine.update, engine.gradients, torch.cuda.CUDAGraph()
    assert update is not None
    assert flat is not None
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        update.launch()
        flat.zero_()

    def step() -> object:
        update.prepare(_RATE, 1.0)
        graph.replay()
        return update.read()

    return step


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
