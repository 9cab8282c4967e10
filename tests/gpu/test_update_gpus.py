"""Is an update that waits for nothing, launched or in a CUDA graph, the update that waits for the norm?"""

from typing import Any

import pytest
import torch
from torch import nn

from qdist.runtime.engine.adamw import build_optimizer
from qdist.runtime.engine.torch import Adapter, TorchEngine

pytestmark = pytest.mark.gpu

SHAPES = ((64, 256), (512, 64), (8, 100), (1, 3))


def engine_of(*, capturable: bool, persistent: bool = False) -> TorchEngine:
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES)
    adapter = Adapter(model, lambda batch: torch.zeros(()))
    optimizer = build_optimizer(
        adapter.named(), name="adamw", fused=True, capturable=capturable, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.01,
    )  # fmt: skip
    return TorchEngine(adapter, optimizer, clip=0.3, graphs=persistent)


def give_gradients(engine: TorchEngine, *, seed: int, scale: float, wrong: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.adapter.parameters():
        made = (torch.randn(parameter.shape, generator=generator) * scale).cuda()
        if parameter.grad is None:
            parameter.grad = made
        else:
            parameter.grad.copy_(made)
    if wrong:
        gradient = next(engine.adapter.parameters()).grad
        assert gradient is not None
        gradient.view(-1)[3] = float("nan")


def captured(engine: TorchEngine) -> Any:
    assert engine.update is not None
    assert engine.gradients is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.update.launch()
        engine.gradients.zero_()
    return graph


@pytest.mark.parametrize(("persistent", "in_graph"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**12])
def test_an_update_without_a_wait_is_the_same(loss_scale: float, persistent: bool, in_graph: bool) -> None:
    waiting, ours = engine_of(capturable=False), engine_of(capturable=True, persistent=persistent)
    assert ours.update is not None
    graph = None
    for step, rate in enumerate((1e-2, 3e-3, 1e-2, 2e-3)):
        if step == 1 and in_graph:  # the moments are there from the first step
            graph = captured(ours)
        for engine in (waiting, ours):
            give_gradients(engine, seed=step, scale=loss_scale, wrong=step == 2)
        wanted = waiting.step(rate, loss_scale)
        if graph is None:
            found = ours.step(rate, loss_scale)
        else:
            ours.update.prepare(rate, loss_scale)
            graph.replay()
            found = ours.update.read()
        assert found.skipped == wanted.skipped == (step == 2)
        assert found.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-6, nan_ok=True)
    first, second = waiting.state(), ours.state()
    assert first.optimizer_steps == second.optimizer_steps == 3
    for name, value in first.parameters.items():
        assert torch.allclose(value, second.parameters[name], rtol=1e-5, atol=1e-7), name
    for moment, named in first.moments.items():
        for name, value in named.items():
            assert torch.allclose(value, second.moments[moment][name], rtol=1e-5, atol=1e-9), (moment, name)


def test_a_captured_update_goes_on_from_a_restored_state() -> None:
    engine = engine_of(capturable=True, persistent=True)
    for step in range(3):
        give_gradients(engine, seed=step, scale=1.0, wrong=False)
        engine.step(1e-2, 1.0)
    before = engine.state()
    found = []
    for _ in range(2):
        for step in (3, 4):
            give_gradients(engine, seed=step, scale=1.0, wrong=False)
            engine.step(1e-2, 1.0)
        found.append(engine.state())
        engine.restore(before)
    first, second = found
    assert first.optimizer_steps == second.optimizer_steps == 5
    for name, value in first.parameters.items():
        assert torch.equal(value, second.parameters[name]), name
        assert torch.equal(first.moments["exp_avg"][name], second.moments["exp_avg"][name]), name
