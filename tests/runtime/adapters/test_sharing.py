"""Adapted linears that read one tensor compute together what each computes alone."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qdist.core.model.families import from_config
from qdist.core.model.gptq import Shape, WeightOffset
from qdist.runtime.adapters.attach import FusedLora, adapt
from qdist.runtime.adapters.lora import Reader, adapted_product, adapted_products
from qdist.runtime.adapters.sharing import share_reads
from qdist.runtime.kernels.dropout import Mask
from qdist.runtime.model.dropout_seed import dropout_seed_of
from qdist.runtime.model.packed import Packed8bit
from qdist.runtime.model.packed_gptq import PackedGptq
from tests.runtime.model.test_packed import INPUTS, OUTPUTS, filled, packed

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_hidden_layers": 2,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "vocab_size": 128, "n_layer": 2}


def gptq() -> PackedGptq:
    offset = WeightOffset(dtype="float32", group_size=32, scale=0.5, linears=(), base="")
    layer = PackedGptq(INPUTS, OUTPUTS, bias=False, dtype=torch.float32, shape=Shape(4, 32), offset=1)
    filled(layer)
    layer.shift = offset
    layer.weight_offset = nn.Parameter(torch.randn(INPUTS // 32, OUTPUTS), requires_grad=False)
    return layer


KINDS = {
    "nf4": lambda: filled(packed("nf4", True)),
    "int8": lambda: filled(Packed8bit(INPUTS, OUTPUTS, bias=True, dtype=torch.float32)),
    "16-bit": lambda: filled(nn.Linear(INPUTS, OUTPUTS, device="meta").requires_grad_(False)),
    "gptq": gptq,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", [1, 16])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_products_together_are_those_of_each_alone(kind: str, pool: int, share: float) -> None:
    torch.manual_seed(0)
    readers = tuple(Reader(KINDS[kind](), scaling) for scaling in (0.5, 2.0))
    mask = Mask(torch.tensor([3]), 4, share) if share else None
    downs, ups = [0.1 * torch.randn(r, INPUTS // pool) for r in (4, 8)], [0.1 * torch.randn(OUTPUTS, r) for r in (4, 8)]
    results = []
    for together in (True, False):
        read = torch.linspace(-1, 1, 6 * INPUTS).view(2, 3, INPUTS)
        leaves = [leaf.clone().requires_grad_() for leaf in (read, *downs, *ups)]
        inputs, *factors = leaves
        if together:
            products: Any = adapted_products(inputs, factors[:2], factors[2:], readers, mask)
        else:
            products = [
                adapted_product(inputs, down, up, *reader, mask)
                for down, up, reader in zip(factors[:2], factors[2:], readers, strict=True)
            ]
        sum((product.sin() * (1 + index)).sum() for index, product in enumerate(products)).backward()
        results.append([*products, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_linear_whose_output_nobody_uses_gets_no_gradient() -> None:
    layer, (inputs, down, up) = nn.Linear(6, 5), (torch.randn(*shape) for shape in ((3, 6), (2, 6), (5, 2)))
    factors = [tensor.clone().requires_grad_() for tensor in (down, down, up, up)]
    products = adapted_products(inputs, factors[:2], factors[2:], (Reader(layer, 1.0),) * 2)
    products[1].sum().backward()
    assert [factor.grad is None for factor in factors] == [True, False, True, False]


def model_of(config: dict[str, Any], targets: Any = "all-linear") -> Any:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    adapted = adapt(backbone, LoraConfig(r=4, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM"))
    share_reads(adapted, from_config(config, name="tiny"), FusedLora)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def layers_of(model: Any) -> list[FusedLora]:
    return [module for module in model.modules() if isinstance(module, FusedLora)]


def results_of(model: Any) -> list[torch.Tensor]:
    dropout_seed_of(model).write(11)
    logits = model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits
    logits.square().sum().backward()
    assert not any(layer.sharing._waiting for layer in layers_of(model) if layer.sharing)
    return [logits, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_computes_together_what_its_linears_compute_alone(recomputed: bool) -> None:
    together, alone = model_of(LLAMA), model_of(LLAMA)
    assert sorted(len(layer.sharing.members) for layer in layers_of(together) if layer.sharing) == [2] * 4 + [3] * 6
    for layer in layers_of(alone):
        layer.sharing = None
    if recomputed:
        contexts = dropout_seed_of(together).contexts
        together.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        together.enable_input_require_grads()
    for one, other in zip(results_of(together), results_of(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_linears_that_read_tensors_of_their_own_stay_alone() -> None:
    assert not any(layer.sharing for layer in layers_of(model_of(BLOOM)))
    assert [bool(layer.sharing) for layer in layers_of(model_of(LLAMA, ["q_proj", "o_proj", "up_proj"]))] == [False] * 6


def test_a_linear_that_is_called_with_another_tensor_computes_with_that() -> None:
    model = model_of(LLAMA).eval()
    first, second = (layer for layer in layers_of(model)[:2])
    given, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    first(given)
    product = second(other)
    second.sharing = None
    torch.testing.assert_close(product, second(other))


def test_a_disabled_adapter_leaves_the_backbone_to_all_readers() -> None:
    model = model_of(LLAMA).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, model.unload()(input_ids=ids).logits)
