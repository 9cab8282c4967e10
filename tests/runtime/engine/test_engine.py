"""One rank's engine: exact to restore, exact to clip, and untouched by what is not finite."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from qdist.core.model.adapters.registry import adapter_parameters
from qdist.core.planning.plan import Plan
from qdist.runtime.data.batches import Samples
from qdist.runtime.engine.adamw import build_optimizer
from qdist.runtime.engine.torch import Adapter, MicroBatch, State, TorchEngine
from qdist.runtime.engine.update import finish_gradients
from tests.runtime.tiny import plan_of, save_config, trainable


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(save_config(folder / "model"), folder / "run")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """With matrices of 4,096 numbers and more, whose moments can be in 8 bits, and some of fewer."""
    folder = tmp_path_factory.mktemp("wide")
    return plan_of(save_config(folder / "model"), folder / "run", lora__r=64, optim__name="adamw-8bit")


def engine_of(
    plan: Plan, *, name: str = "adamw", on_device: bool = False, clip: float = 0.3, ratio_b: float = 1.0, **how: Any
) -> tuple[TorchEngine, Samples]:
    """on_device: as on a GPU, where the update does not wait for the norm."""
    _, adapter, samples = trainable(plan)
    optimizer = build_optimizer(
        adapter.named(), name=name, fused=on_device, capturable=on_device, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.01, ratio_b=ratio_b,
    )  # fmt: skip
    return TorchEngine(adapter, optimizer, clip=clip, **how), samples


def advance(engine: TorchEngine, samples: Samples, steps: range, *, loss_scale: float = 1.0) -> list[float]:
    losses = []
    for step in steps:
        batches = samples.step(step)
        learned = sum(map(samples.learned, batches))
        micro_batches = [MicroBatch(partial(samples.batch, batch), seed) for seed, batch in enumerate(batches)]
        losses.append(float(engine.accumulate(micro_batches, weight=1 / learned, loss_scale=loss_scale)))
        engine.step(1e-2, loss_scale)
    return losses


def flat(state: State) -> dict[str, torch.Tensor]:
    moments = {f"{moment}.{name}": value for moment, named in state.moments.items() for name, value in named.items()}
    return {**state.parameters, **moments}


def same(one: State, other: State) -> bool:
    first, second = flat(one), flat(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ratio_b": 16.0},
        {"on_device": True},
        {"on_device": True, "graphs": True, "ratio_b": 4.0},
        {"name": "adamw-8bit"},
    ],
)
def test_a_restored_engine_goes_on_bit_for_bit(plan: Plan, wide: Plan, how: dict[str, Any]) -> None:
    plan = wide if "name" in how else plan
    whole, samples = engine_of(plan, **how)
    advance(whole, samples, range(3))
    saved = whole.state()
    losses = advance(whole, samples, range(3, 6))
    fresh, _ = engine_of(plan, **how)
    fresh.restore(saved)
    assert same(fresh.state(), saved)
    assert fresh.state().optimizer_steps == 3
    assert advance(fresh, samples, range(3, 6)) == losses
    assert same(fresh.state(), whole.state())


def test_a_state_is_a_copy_and_names_parameters_as_the_model_does(plan: Plan) -> None:
    engine, samples = engine_of(plan)
    untrained = engine.state()
    assert untrained.moments == {}
    assert untrained.optimizer_steps == 0
    kept = {name: value.clone() for name, value in untrained.parameters.items()}
    advance(engine, samples, range(1))
    assert all(torch.equal(kept[name], untrained.parameters[name]) for name in kept)
    state = engine.state()
    assert state.optimizer_steps == 1
    assert set(state.moments) == {"exp_avg", "exp_avg_sq"}
    assert all(set(moments) == set(state.parameters) for moments in state.moments.values())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in state.parameters


def test_an_untrained_state_can_be_restored(plan: Plan) -> None:
    engine, samples = engine_of(plan)
    untrained = engine.state()
    advance(engine, samples, range(2))
    fresh, _ = engine_of(plan)
    fresh.restore(untrained)
    advance(fresh, samples, range(2))
    assert same(fresh.state(), engine.state())


@pytest.mark.parametrize("loss_scale", [2.0**10, 2.0**16])
def test_a_loss_scale_that_is_a_power_of_two_changes_nothing(plan: Plan, loss_scale: float) -> None:
    plain, samples = engine_of(plan)
    scaled, _ = engine_of(plan)
    advance(plain, samples, range(2))
    advance(scaled, samples, range(2), loss_scale=loss_scale)
    first, second = flat(plain.state()), flat(scaled.state())
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-6


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_leave_everything_untouched(plan: Plan, wrong: float, on_device: bool) -> None:
    engine, samples = engine_of(plan, on_device=on_device)
    advance(engine, samples, range(2))
    before = engine.state()
    for parameter in engine.adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(iter(engine.adapter.parameters())).grad.view(-1)[3] = wrong  # type: ignore[union-attr]
    assert engine.step(1e-2, 1.0).skipped
    assert same(engine.state(), before)
    assert engine.state().optimizer_steps == 2
    assert all(parameter.grad is None for parameter in engine.adapter.parameters())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("clip", "loss_scale"), [(0.3, 1.0), (0.0, 1.0), (1e9, 1.0), (0.3, 2.0**12), (0.0, 2.0**12)])
def test_an_update_that_does_not_wait_for_the_norm_is_the_same_update(
    plan: Plan, clip: float, loss_scale: float, persistent: bool
) -> None:
    waiting, _ = engine_of(plan, clip=clip)
    ours, _ = engine_of(plan, clip=clip, on_device=True, graphs=persistent)
    assert (waiting.update is None, ours.update is None) == (True, False)
    for step in range(3):
        for engine in (waiting, ours):
            give_gradients(engine, scale=loss_scale, seed=step)
        wanted = waiting.step(1e-2, loss_scale)
        assert ours.step(1e-2, loss_scale) == (pytest.approx(wanted.gradient_norm, rel=1e-6), False)
    first, second = flat(waiting.state()), flat(ours.state())
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-5, atol=1e-8), name
    assert ours.state().optimizer_steps == 3


def give_gradients(engine: TorchEngine, *, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.adapter.parameters():
        made = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.grad is None:
            parameter.grad = made
        else:
            parameter.grad.copy_(made)


def test_persistent_gradients_stay_where_they_are_and_are_zero_after_a_step(plan: Plan) -> None:
    engine, samples = engine_of(plan, graphs=True)
    before = [gradient(parameter).data_ptr() for parameter in engine.adapter.parameters()]
    advance(engine, samples, range(2))
    assert [gradient(parameter).data_ptr() for parameter in engine.adapter.parameters()] == before
    assert not any(gradient(parameter).any() for parameter in engine.adapter.parameters())


def test_what_another_stage_lacks_skips_an_update_on_the_device_too(plan: Plan) -> None:
    engine, samples = engine_of(plan, on_device=True, across=lambda square: square + float("inf"))
    before = engine.state()
    advance(engine, samples, range(1))
    assert all(torch.equal(engine.state().parameters[name], value) for name, value in before.parameters.items())
    assert engine.state().optimizer_steps == 0


def parameters_with_gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for shape in ((7, 3), (5,), (4, 4)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator) * scale
        made.append(parameter)
    return made


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("clip", [0.3, 1.0, 1e9])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_clipping_is_torchs(scale: float, clip: float, loss_scale: float) -> None:
    ours, torchs = parameters_with_gradients(scale * loss_scale), parameters_with_gradients(scale)
    result = finish_gradients(ours, clip=clip, loss_scale=loss_scale)
    norm = nn.utils.clip_grad_norm_(torchs, clip)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-6)
    for one, other in zip(ours, torchs, strict=True):
        assert torch.allclose(gradient(one), gradient(other), rtol=1e-5)


def test_the_norm_is_over_all_stages() -> None:
    whole, part = parameters_with_gradients(10.0), parameters_with_gradients(10.0)[:2]
    rest = float(gradient(whole[2]).double().square().sum())
    wanted = finish_gradients(whole, clip=0.3, loss_scale=4.0)
    result = finish_gradients(part, clip=0.3, loss_scale=4.0, across=lambda square: square + rest)
    assert result.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-6)
    assert all(torch.allclose(gradient(a), gradient(b)) for a, b in zip(part, whole[:2], strict=True))


def test_what_is_not_finite_on_another_stage_skips_the_step_here() -> None:
    ours = parameters_with_gradients(1.0)
    assert finish_gradients(ours, clip=0.3, loss_scale=1.0, across=lambda square: square + float("inf")).skipped


def test_a_clip_of_zero_leaves_gradients_as_they_are() -> None:
    ours, before = parameters_with_gradients(100.0), parameters_with_gradients(100.0)
    finish_gradients(ours, clip=0.0, loss_scale=1.0)
    assert all(torch.equal(gradient(a), gradient(b)) for a, b in zip(ours, before, strict=True))


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_an_adapter_holds_what_trains_and_nothing_else(plan: Plan) -> None:
    model, adapter, _ = trainable(plan)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(adapter.named()) == wanted
    assert all("lora_" in name for name in wanted)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert sum(p.numel() for p in adapter.parameters()) == adapter_parameters(plan.facts, 4, ("all-linear",))


def test_the_first_adapter_follows_the_seed_alone(plan: Plan) -> None:
    def first(seed: int) -> Iterator[torch.Tensor]:
        torch.manual_seed(seed)
        torch.rand(5)
        return iter(trainable(plan)[1].parameters())

    assert all(torch.equal(one, other) for one, other in zip(first(1), first(2), strict=True))
    assert isinstance(trainable(plan)[1], Adapter)
