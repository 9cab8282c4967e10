"""Packed layers compute what bitsandbytes' own do, and the fused LoRA layer what PEFT's does."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qdist.core.spec.sections import Quant
from qdist.runtime.adapters.attach import FusedLora
from qdist.runtime.kernels.dropout import Mask, kept
from qdist.runtime.kernels.four_bit import dequantize_reference
from qdist.runtime.model.packed import Packed4bit, Packed8bit, PackedLinear
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights

INPUTS, OUTPUTS = 128, 192
FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def packed(quant_type: Any, double: bool, *, bias: bool = False) -> Packed4bit:
    return Packed4bit(INPUTS, OUTPUTS, bias=bias, dtype=torch.float32, quant=Quant(type=quant_type, double=double))


def filled(layer: nn.Module) -> nn.Module:
    holder = nn.ModuleDict({"linear": layer})
    fill(holder, RandomWeights(torch.device("cpu"), torch.float32), device=torch.device("cpu"))
    return holder["linear"]


def compute_the_same(one: nn.Module, other: nn.Module, *batch: int) -> None:
    """Outputs and input gradients."""
    inputs, outer = torch.randn(*batch, INPUTS), torch.randn(*batch, OUTPUTS)
    results = []
    for module in (one, other):
        leaf = inputs.clone().requires_grad_()
        product = module(leaf)
        product.backward(outer)
        results.append((product.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("quant_type", "double"), FOUR_BIT)
@pytest.mark.parametrize("bias", [False, True])
def test_a_4_bit_layer_computes_what_bitsandbytes_does(quant_type: str, double: bool, bias: bool) -> None:
    layer = filled(packed(quant_type, double, bias=bias))
    theirs = bnb.nn.Linear4bit(
        INPUTS, OUTPUTS, bias=bias, compute_dtype=torch.float32, compress_statistics=double, quant_type=quant_type
    )
    matrix = RandomWeights(torch.device("cpu"), torch.float32)._matrix("linear.weight", (OUTPUTS, INPUTS))
    theirs.weight = bnb.nn.Params4bit(
        matrix, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=theirs
    )
    theirs = theirs.to("cpu")
    if bias:
        layer.bias.data.normal_()
        theirs.bias = layer.bias
    assert torch.equal(theirs.weight.data, layer.weight.data)
    compute_the_same(layer, theirs, 3, 5)


def test_an_int8_layer_computes_what_bitsandbytes_does() -> None:
    layer = filled(Packed8bit(INPUTS, OUTPUTS, bias=False, dtype=torch.float32))
    theirs = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
    matrix = RandomWeights(torch.device("cpu"), torch.float32)._matrix("linear.weight", (OUTPUTS, INPUTS))
    theirs.weight = bnb.nn.Int8Params(matrix, requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu")
    compute_the_same(layer, theirs, 7)


@pytest.mark.parametrize(("quant_type", "double"), FOUR_BIT)
def test_unpacking_gives_the_values_of_the_format(quant_type: str, double: bool) -> None:
    layer = filled(packed(quant_type, double))
    matrix = RandomWeights(torch.device("cpu"), torch.float32)._matrix("linear.weight", (OUTPUTS, INPUTS))
    _, state = bnb.functional.quantize_4bit(matrix, quant_type=quant_type, compress_statistics=double)
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, state)
    nested = (layer.nested_absmax, layer.nested_offset) if double else None
    ours = dequantize_reference(
        layer.weight, layer.absmax, nested, quant_type=quant_type, shape=(OUTPUTS, INPUTS), dtype=torch.float32
    )
    assert torch.equal(ours, theirs)


KINDS = {
    "nf4": lambda: packed("nf4", True),
    "int8": lambda: Packed8bit(INPUTS, OUTPUTS, bias=True, dtype=torch.float32),
    "16-bit": lambda: nn.Linear(INPUTS, OUTPUTS, device="meta").requires_grad_(False),
}


class Masked(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        keep = kept(self.mask, inputs[..., 0].numel(), inputs.shape[-1]).view(inputs.shape)
        return inputs * keep / (1 - self.mask.share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fused_adapter_computes_what_peft_does(kind: str, dropout: float) -> None:
    results = []
    for custom in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=24, lora_dropout=dropout, target_modules=["linear"])
        if custom:
            config._register_custom_module({nn.Linear: FusedLora})
        model = get_peft_model(nn.Sequential(nn.ModuleDict({"linear": filled(KINDS[kind]())})), config)
        layer = model.base_model.model[0]["linear"]
        assert isinstance(layer, FusedLora) == custom
        if dropout and not custom:
            layer.lora_dropout["default"] = Masked(Mask(torch.tensor([0]), 0, dropout))
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        leaf = torch.randn(2, 6, INPUTS, requires_grad=True)
        torch.manual_seed(1)
        product = layer(leaf)
        product.backward(torch.sin(torch.arange(product.numel())).view_as(product))
        results.append([product, leaf.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_fused_adapter_are_those_of_finite_differences() -> None:
    from qdist.runtime.adapters.lora import adapted_product

    layer = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (4, 6), (5, 4))]
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_product(x, a, b, layer, 0.7), leaves)


def test_what_the_fused_adapter_keeps_is_its_input_and_the_narrow_product() -> None:
    config = LoraConfig(r=8, target_modules=["linear"])
    config._register_custom_module({nn.Linear: FusedLora})
    model = get_peft_model(nn.Sequential(nn.ModuleDict({"linear": filled(packed("nf4", True))})), config)
    kept: list[torch.Tensor] = []
    inputs = torch.randn(10, INPUTS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda held: held):
        model.base_model.model[0]["linear"](inputs)
    new = {tensor.data_ptr(): tuple(tensor.shape) for tensor in kept if not isinstance(tensor, nn.Parameter)}
    assert sorted(new.values()) == [(10, 8), (10, INPUTS)]
    assert inputs.data_ptr() in new


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_add_to_a_product_in_place(kind: str) -> None:
    layer, config = filled(KINDS[kind]()), LoraConfig(r=8, target_modules=["linear"])
    config._register_custom_module({nn.Linear: FusedLora})
    model = get_peft_model(nn.Sequential(nn.ModuleDict({"linear": layer})), config)
    for module in (layer, model.base_model.model[0]["linear"]):
        inputs = torch.randn(2, 6, INPUTS, requires_grad=True)
        product = module(inputs)
        product += 1.0
        product.sum().backward()
        assert inputs.grad is not None


def test_packed_bytes_are_parameters_that_need_no_gradient() -> None:
    for layer in (packed("nf4", True), Packed8bit(INPUTS, OUTPUTS, bias=True, dtype=torch.float32)):
        assert isinstance(layer, PackedLinear)
        assert {name for name, _ in layer.named_parameters()} >= {"weight"}
        assert not any(parameter.requires_grad for parameter in layer.parameters())
