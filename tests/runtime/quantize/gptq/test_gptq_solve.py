"""GPTQ of one linear: better than rounding where inputs are related, the same where they are not."""

import pytest
import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import Shape
from qdist.runtime.kernels.gptq_bits import dequantize
from qdist.runtime.kernels.gptq_solve import fit
from qdist.runtime.quantize.gptq import solve as solving
from qdist.runtime.quantize.gptq.solve import Solution, curvature, relative_error, solve, unpacked

INPUTS, OUTPUTS = 192, 32


pytestmark = pytest.mark.usefixtures("one_thread")


def weight_of(seed: int = 0, inputs: int = INPUTS) -> torch.Tensor:
    return torch.randn(OUTPUTS, inputs, generator=torch.Generator().manual_seed(seed))


def related(seed: int = 1, *, rank: int = 48, tokens: int = 1024) -> torch.Tensor:
    """The Hessian of inputs that are mixtures of few sources, of sizes far apart."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, INPUTS, generator=generator)
    noise = 0.3 * torch.randn(tokens, INPUTS, generator=generator)
    inputs = (sources + noise) * torch.rand(INPUTS, generator=generator).mul(3).exp()
    return 2 / tokens * inputs.t() @ inputs


def solved(weight: torch.Tensor, hessian: torch.Tensor, shape: Shape, *, act: bool = False, **more: object) -> Solution:
    inputs = curvature(hessian, by_activation=act, name="model.layers.0.up")
    return solve(weight, inputs, shape, **{"sym": True, "name": "model.layers.0.up", **more})  # type: ignore[arg-type]


def rounded(weight: torch.Tensor, shape: Shape, importance: torch.Tensor, *, sym: bool) -> torch.Tensor:
    """Each group to the nearest values of its grid, [out, in]."""
    size = weight.shape[1] if shape.group_size == -1 else shape.group_size
    parts = []
    for start in range(0, weight.shape[1], size):
        group = weight.t()[start : start + size]
        grid = fit(group, importance[start : start + size], shape.bits, sym=sym, lowest_zero=0)
        parts.append(grid.values(grid.codes(group)))
    return torch.cat(parts).t()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act", [False, True], ids=["in order", "desc_act"])
def test_related_inputs_make_good_each_others_errors(bits: int, act: bool) -> None:
    weight, hessian, shape = weight_of(), related(), Shape(bits, 64)  # type: ignore[arg-type]
    ours = solved(weight, hessian, shape, act=act)
    nearest = rounded(weight, shape, torch.ones(INPUTS), sym=True)
    assert ours.error < 0.5 * relative_error(weight, nearest, hessian)
    assert ours.error == pytest.approx(relative_error(weight, ours.weight(), hessian))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "no-sym"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_unrelated_inputs_are_rounded_to_the_nearest(group_size: int, sym: bool) -> None:
    weight, shape = weight_of(), Shape(4, group_size)
    diagonal = torch.rand(INPUTS, generator=torch.Generator().manual_seed(2)) + 0.1
    damped = diagonal + 0.01 * diagonal.mean()
    ours = solved(weight, torch.diag(diagonal), shape, sym=sym).weight()
    assert torch.allclose(ours, rounded(weight, shape, damped, sym=sym), atol=1e-6)


@pytest.mark.parametrize("act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize(("sym", "offset"), [(True, 1), (False, 0), (False, 1)], ids=["sym", "v2", "no-sym v1"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_file_says_what_was_chosen(bits: int, group_size: int, sym: bool, offset: int, act: bool) -> None:
    weight, shape = weight_of(), Shape(bits, group_size)  # type: ignore[arg-type]
    weight[:8] = weight[:8].abs()  # groups without a negative weight, whose best zero is 0
    ours = solved(weight, related(), shape, act=act, sym=sym, lowest_zero=offset)
    stored = ours.packed(offset=offset, name="up")
    assert stored.qweight.shape == (INPUTS * bits // 32, OUTPUTS)
    assert stored.qzeros.shape == (shape.groups(INPUTS), OUTPUTS * bits // 32)
    assert (stored.scales.dtype, stored.g_idx.dtype) == (torch.float16, torch.int32)
    read = dequantize(
        stored.qweight, stored.qzeros, stored.scales, stored.g_idx, bits=bits, offset=offset, dtype=torch.float32
    )
    assert torch.equal(read.t(), ours.weight())
    assert torch.equal(unpacked(stored, bits, offset=offset), ours.weight())
    sizes = torch.bincount(stored.g_idx, minlength=shape.groups(INPUTS))
    assert sizes[:-1].eq(group_size).all()
    assert int(ours.zeros.min()) >= offset
    assert bits == 2 or ours.error < 0.1


def test_groups_are_formed_in_the_order_of_activations() -> None:
    hessian = related()
    ours = solved(weight_of(), hessian, Shape(4, 64), act=True)
    falling = hessian.diagonal().argsort(descending=True)
    assert ours.groups[falling].tolist() == [position // 64 for position in range(INPUTS)]


def test_a_zero_of_one_cuts_no_weight_off() -> None:
    """A group of positive weights keeps its largest weight although its zero is 1."""
    weights = torch.linspace(0.5, 3, 32)[:, None]
    for bits in (2, 3, 4, 8):
        grid = fit(weights, torch.ones(32), bits, sym=False, lowest_zero=1, search=False)
        assert float(grid.zero) == 1
        assert float(grid.values(grid.codes(weights)).max()) == pytest.approx(3, rel=1e-3)


def test_a_search_of_the_range_never_errs_more() -> None:
    weights = torch.randn(64, 16, generator=torch.Generator().manual_seed(4)) ** 3
    for bits, sym in ((2, True), (3, False), (4, True)):
        losses = []
        for search in (False, True):
            grid = fit(weights, torch.ones(64), bits, sym=sym, lowest_zero=0, search=search)
            losses.append((grid.values(grid.codes(weights)) - weights).square().sum(0))
        assert bool((losses[1] <= losses[0]).all())
        assert float(losses[1].sum()) < 0.95 * float(losses[0].sum())


def test_inputs_that_are_always_zero_are_rounded_and_disturb_nobody() -> None:
    weight, hessian, shape = weight_of(), related(), Shape(8, 64)
    hessian[70], hessian[:, 70] = 0, 0
    ours = solved(weight, hessian, shape)
    assert ours.error < 1e-4
    assert torch.allclose(ours.weight()[:, 70], weight[:, 70], atol=0.03)
    nothing = solved(weight, torch.zeros(INPUTS, INPUTS), shape)
    assert nothing.error == 0
    assert torch.allclose(nothing.weight(), weight, atol=0.03)


def test_a_singular_hessian_raises_the_damping() -> None:
    hessian = related(rank=8, tokens=16)
    hessian.diagonal().mul_(0.999)  # a little of what rounding does, and more: not even semidefinite
    inputs = curvature(hessian, damping=1e-6, by_activation=False, name="up")
    assert inputs.damping > 1e-6
    exponent = torch.log10(torch.tensor(inputs.damping / 1e-6))
    assert float(exponent) == pytest.approx(round(float(exponent)), abs=1e-4)
    assert curvature(related(), by_activation=False, name="up").damping == 0.01


@pytest.mark.parametrize("columns", [50, 64, 2048])
def test_the_factor_is_that_of_the_inverse(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_COLUMNS", columns)
    hessian = related()
    inputs = curvature(hessian, by_activation=True, name="up")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INPUTS)
    inverse = torch.linalg.inv(damped.double()[inputs.order][:, inputs.order])
    assert torch.equal(inputs.upper, inputs.upper.triu())
    assert torch.allclose(inputs.upper.double().t() @ inputs.upper.double(), inverse, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pairs", [50, 64, 192, 2048])
def test_what_is_lost_is_summed_over_all_pairs_of_inputs(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, near, hessian = weight_of(), weight_of().round(decimals=1), related()
    lost, whole = (weight - near).double(), weight.double()
    expected = ((lost @ hessian.double()) * lost).sum() / ((whole @ hessian.double()) * whole).sum()
    monkeypatch.setattr(solving, "_PAIRS", pairs)
    assert relative_error(weight, near, hessian) == pytest.approx(float(expected), rel=1e-4)


def test_a_copy_of_a_factor_lies_in_memory_as_the_factor_does() -> None:
    """Or another device would multiply with it in another order."""
    inputs = curvature(related(), by_activation=False, name="up")
    by_column, there = inputs._replace(upper=inputs.upper.t().contiguous().t()), torch.device("meta")
    assert inputs.to(there).upper.stride() == (INPUTS, 1)
    assert by_column.to(there).upper.stride() == (1, INPUTS)
    assert {tensor.device for tensor in by_column.to(there)[:3]} == {there}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_error_that_is_not_finite_is_found_wherever_it_arose(
    block: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding, seen = solving.round_block, list[int]()

    def broken(*given: torch.Tensor, top: int) -> object:
        rounded = rounding(*given, top=top)
        seen.append(len(seen))
        rounded.errors[5, 7] = value if seen[-1] == block else rounded.errors[5, 7]
        return rounded

    monkeypatch.setattr(solving, "round_block", broken)
    with pytest.raises(ModelError, match="its solution is NaN or beyond float16"):
        solved(weight_of(), related(), Shape(4, 64))


def test_nan_names_the_module() -> None:
    weight, hessian = weight_of(), related()
    weight[3, 5] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.0\.up has weights that are NaN"):
        solved(weight, hessian, Shape(4, 64))
    hessian[3, 5] = torch.inf
    with pytest.raises(ModelError, match=r"model\.layers\.0\.up reads inputs that are NaN"):
        solved(weight_of(), hessian, Shape(4, 64))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.up: its solution is NaN or beyond float16"):
        solved(1e9 * weight_of(), related(), Shape(4, 64))
