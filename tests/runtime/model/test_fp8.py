"""Products in fp8: near those in 16 bits, forward and backward by the same bytes, and only where they are wanted."""

from typing import Any

import pytest
import torch
from torch import nn

from qdist.core.model.gptq import Gptq, Shape, WeightOffset
from qdist.core.spec.sections import Compute, Quant
from qdist.runtime.adapters.lora import Reader, adapted_product, adapted_products
from qdist.runtime.kernels import fp8
from qdist.runtime.kernels.fp8 import FP8, Scaled, quantize_tokens
from qdist.runtime.model.packed import FEW_TOKENS, Packed4bit, PackedLinear, set_compute
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights

INPUTS, OUTPUTS, TOKENS = 192, 160, 48
KINDS = ["nf4", "fp4", "nf4 of single quantization", "nf4 of broken blocks", "gptq", "gptq in activation order"]


def linear(kind: str, *, bias: bool = False) -> PackedLinear:
    """A filled layer in training, whose compute is left to the test."""
    inputs, outputs = (INPUTS - 16 if "broken" in kind else INPUTS), OUTPUTS
    shape: dict[str, Any] = {"bias": bias, "dtype": torch.bfloat16}
    layer: PackedLinear
    if kind.startswith("gptq"):
        gptq = Gptq(shape=Shape(4, 32), sym=False, desc_act="order" in kind)
        layer = PackedGptq(inputs, outputs, shape=gptq.shape, offset=1, ordered=gptq.desc_act, **shape)
    else:
        quant = Quant(type="fp4" if kind == "fp4" else "nf4", double="single" not in kind)
        layer = Packed4bit(inputs, outputs, quant=quant, **shape)
    fill(
        nn.ModuleDict({"linear": layer}), RandomWeights(torch.device("cpu"), torch.bfloat16), device=torch.device("cpu")
    )
    if layer.bias is not None:
        layer.bias.data.normal_()
    return layer.train()


def activations(width: int, tokens: int = TOKENS) -> torch.Tensor:
    """With outliers in two channels, as language models have them, and a token of zeros."""
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    values[:, [3, width // 2]] *= 20
    values[1] = 0
    return values.bfloat16()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0))


def test_a_token_is_scaled_by_its_largest_magnitude() -> None:
    values, scale = quantize_tokens(torch.tensor([[1.0, -448.0], [0.5, 0.25], [0.0, 0.0]]))
    assert values.dtype == FP8
    assert values[:2].float().tolist() == [[1.0, -448.0], [448.0, 224.0]]
    assert scale[:2].tolist() == [1.0, float(torch.tensor(0.5 / 448))]
    assert not values[2].float().any()


def test_factors_are_multiplied_before_a_token_is_scaled() -> None:
    given, factors = activations(96), torch.rand(96)
    values, scale = quantize_tokens(given, factors)
    wanted, wanted_scale = quantize_tokens(given.float() * factors)
    assert torch.equal(values.float(), wanted.float())
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_in_fp8_are_near_those_in_16_bits(kind: str, bias: bool) -> None:
    layer = linear(kind, bias=bias)
    inputs, outer = activations(layer.in_features), activations(OUTPUTS)
    wanted, wanted_gradient = layer.product(inputs), layer.input_gradient(outer)
    layer.compute = "fp8"
    found, gradient = layer.product(inputs), layer.input_gradient(outer)
    assert found.dtype == gradient.dtype == torch.bfloat16
    assert 0.998 < cosine(found, wanted) < 0.99999
    assert 0.998 < cosine(gradient, wanted_gradient) < 0.99999


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_multiply_the_same_bytes(kind: str) -> None:
    layer = linear(kind)
    there, back = (layer.in_fp8(torch.device("cpu"), transposed=transposed) for transposed in (False, True))
    assert there.values.is_contiguous()
    assert back.values.is_contiguous()
    assert torch.equal(there.values.float(), back.values.float().t())
    assert torch.equal(there.scale, back.scale)
    weights = layer.unpacked(torch.device("cpu"))
    assert cosine(there.values.float() * there.scale.unsqueeze(1), weights) > 0.999


@pytest.mark.parametrize("kind", ["nf4", "gptq", "merged qa-lora"])
def test_gradients_are_added_to_a_sum_once(kind: str) -> None:
    layer = linear("nf4" if kind == "nf4" else "gptq")
    layer.compute = "fp8"
    if isinstance(layer, PackedGptq) and kind != "gptq":
        layer.shift = WeightOffset(group_size=32, scale=0.01, linears=("linear",), base="")
        layer.weight_offset = nn.Parameter(torch.randn(INPUTS // 32, OUTPUTS).half(), requires_grad=False)
    outer, total = activations(OUTPUTS), torch.ones(TOKENS, INPUTS, dtype=torch.bfloat16)
    wanted = total + layer.input_gradient(outer)
    layer.add_input_gradient(outer, total)
    torch.testing.assert_close(total, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_linears_that_read_one_tensor_quantize_it_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, inputs = [linear(kind, bias=True), linear("nf4"), linear("nf4")], activations(INPUTS)
    layers[0].compute = layers[1].compute = "fp8"
    wanted, quantized = [layer.product(inputs) for layer in layers], list[torch.Tensor]()

    def quantize(given: torch.Tensor) -> Scaled:
        quantized.append(given)
        return quantize_tokens(given)

    monkeypatch.setattr(fp8, "quantize_tokens", quantize)
    downs, ups = ([torch.zeros(shape)] * 3 for shape in ((8, INPUTS), (OUTPUTS, 8)))
    products = adapted_products(inputs, downs, ups, tuple(Reader(layer, 1.0) for layer in layers))
    assert len(quantized) == 1
    assert all(torch.equal(one, other) for one, other in zip(products, wanted, strict=True))


def test_scales_of_weights_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, device = linear("nf4"), torch.device("cpu")
    first = layer.in_fp8(device, transposed=False)
    monkeypatch.setattr(layer, "find_row_scales", None)
    assert layer.in_fp8(device, transposed=True).scale is first.scale


def test_evaluation_and_a_few_tokens_stay_in_16_bits() -> None:
    layer, inputs = linear("nf4"), activations(INPUTS)
    few = inputs[:FEW_TOKENS]
    wanted, wanted_of_few = layer.product(inputs), layer.product(few)
    layer.compute = "fp8"
    assert torch.equal(layer.product(few), wanted_of_few)
    assert not torch.equal(layer.product(inputs), wanted)
    assert torch.equal(layer.eval().product(inputs), wanted)


def test_only_shapes_that_torch_multiplies_are_set() -> None:
    shape: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16, "quant": Quant()}
    model = nn.ModuleDict(
        {"even": Packed4bit(64, 48, **shape), "odd": Packed4bit(64, 40, **shape), "n": nn.Linear(8, 8)}
    )
    set_compute(model, "fp8")
    assert model["even"].compute == "fp8"
    assert model["odd"].compute is None


def test_an_adapter_beside_a_product_in_fp8_learns_what_it_learns_in_16_bits() -> None:
    layer, inputs, outer = linear("nf4"), activations(INPUTS), activations(OUTPUTS)
    found = []
    computes: tuple[Compute | None, ...] = (None, "fp8")
    for compute in computes:
        layer.compute = compute
        generator = torch.Generator().manual_seed(1)
        down = torch.randn(8, INPUTS, generator=generator).requires_grad_()
        up = torch.randn(OUTPUTS, 8, generator=generator).requires_grad_()
        leaf = inputs.clone().requires_grad_()
        adapted_product(leaf, down, up, layer, 0.01).backward(outer)
        found.append((leaf.grad, down.grad, up.grad))
    (gradient, *adapter), (gradient_fp8, *adapter_fp8) = found
    assert cosine(gradient, gradient_fp8) > 0.998
    assert all(torch.equal(one, other) for one, other in zip(adapter, adapter_fp8, strict=True))
