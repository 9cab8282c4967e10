"""AdamW's forms: the rates of matrices, moments in 8 bits as they are stored, and their planned bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qdist.core.planning.memory import EIGHT_BIT_CODES, eight_bit_moments
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.adamw import allocate_moments, build_optimizer, collect_moments, set_rate, update_parameters
from qdist.runtime.engine.torch import State, fill_moments, moment_bytes, to_cpu
from qdist.runtime.train.checkpoint import Progress, load, save

A, B, ROWS = "layer.q.lora_A.default.weight", "layer.q.lora_B.default.weight", "embed.trainable_tokens_delta"
EXPERTS = "mlp.experts.lora_B.default.weight"
SHAPES = {A: (64, 100), B: (70, 64), ROWS: (2, 10), EXPERTS: (8, 9)}


def optimizer_of(
    name: str = "adamw", *, ratio_b: float = 1.0, on_device: bool = False, seed: int = 0
) -> tuple[Any, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    named = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
    optimizer = build_optimizer(
        named, name=name, fused=on_device, capturable=on_device, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
        ratio_b=ratio_b,
    )  # fmt: skip
    return optimizer, named


def advance(optimizer: Any, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_rate(optimizer, 1e-2)
        update_parameters(optimizer)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 16.0])
@pytest.mark.parametrize(("name", "on_device"), [("adamw", False), ("adamw", True), ("adamw-8bit", False)])
def test_only_b_matrices_learn_at_another_rate(name: str, on_device: bool, ratio: float) -> None:
    """Adam's first step has the size of the rate."""
    optimizer, named = optimizer_of(name, ratio_b=ratio, on_device=on_device)
    before = {key: value.detach().clone() for key, value in named.items()}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    advance(optimizer, named, range(1))
    for key, wanted in {A: 1e-2, B: 1e-2 * ratio, ROWS: 1e-2, EXPERTS: 1e-2 * ratio}.items():
        moved = (named[key].detach() - before[key]).abs().median()
        assert float(moved) == pytest.approx(wanted, rel=1e-2), key


def test_rates_that_are_one_have_one_group_and_no_ratio() -> None:
    assert len(optimizer_of()[0].param_groups) == 1
    assert [group["ratio"] for group in optimizer_of(ratio_b=16.0)[0].param_groups] == [1.0, 16.0]


def test_an_update_without_waits_is_that_of_bitsandbytes() -> None:
    (ours, first), (theirs, second) = optimizer_of("adamw-8bit"), optimizer_of("adamw-8bit")
    advance(ours, first, range(3))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in second.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_rate(theirs, 1e-2)
        theirs.step()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_moments_in_8_bits_go_through_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    whole, named = optimizer_of("adamw-8bit")
    advance(whole, named, range(3))
    moments = {
        moment: {name: to_cpu(value) for name, value in values.items()}
        for moment, values in collect_moments(whole, named).items()
    }
    assert {name: value.dtype for name, value in moments["exp_avg"].items()} == {
        A: torch.uint8, B: torch.uint8, ROWS: torch.float32, EXPERTS: torch.float32,
    }  # fmt: skip
    assert moments["exp_avg_scales"].keys() == moments["exp_avg_sq_scales"].keys() == {A, B}
    saved = State({name: to_cpu(value) for name, value in named.items()}, moments, 3)
    _, state = load(save(RunDir(tmp_path), Progress(step=3, samples=3, optimizer_steps=3), saved, keep=1))
    fresh, others = optimizer_of("adamw-8bit", seed=1)
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(state.parameters[name])
    allocate_moments(fresh, state.optimizer_steps)
    fill_moments(fresh, others, state)
    advance(whole, named, range(3, 6))
    advance(fresh, others, range(3, 6))
    assert all(torch.equal(named[name], others[name]) for name in named)


def test_a_moment_quantized_anew_would_not_be_the_same() -> None:
    """Why checkpoints have its bytes: the code of the first moment has 1 and not -1, so that scales shrink."""
    optimizer, named = optimizer_of("adamw-8bit")
    advance(optimizer, named, range(3))
    state, ops = optimizer.state[named[A]], torch.ops.bitsandbytes
    plain = ops.dequantize_blockwise(state["state1"], state["absmax1"], state["qmap1"], 256, torch.float32)
    _, scales = ops.quantize_blockwise(plain, state["qmap1"], 256)
    assert float(state["qmap1"].max()) == 1.0 > -float(state["qmap1"].min())
    assert not torch.equal(scales, state["absmax1"])


def test_moments_in_8_bits_take_the_bytes_that_are_planned() -> None:
    optimizer, named = optimizer_of("adamw-8bit")
    advance(optimizer, named, range(1))
    planned = EIGHT_BIT_CODES + sum(eight_bit_moments(value.numel()) for value in named.values())
    assert moment_bytes(optimizer) == planned
