"""Linears made for answering compute what PEFT's layers do, each row with an adapter of its own."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qdist.core.errors import ModelError, SpecError
from qdist.core.model.gptq import Shape, WeightOffset
from qdist.runtime.adapters.attach import FusedLora, adapt
from qdist.runtime.infer import frozen
from qdist.runtime.infer.linears import MOST_ROWS, AnsweringLinear, prepare_linears
from qdist.runtime.kernels.small_product import torch_products
from qdist.runtime.model.packed import Packed8bit, PackedLinear
from qdist.runtime.model.packed_gptq import PackedGptq
from tests.runtime.model.test_packed import INPUTS, OUTPUTS, filled, packed
from tests.runtime.moe_models import packed_model
from tests.runtime.tiny import tiny_model

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def gptq(*, ordered: bool = False, shift: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = PackedGptq(INPUTS, OUTPUTS, bias=False, dtype=dtype, shape=Shape(4, 32), offset=1, ordered=ordered)
    filled(layer)
    if ordered:
        layer.g_idx = layer.g_idx[torch.randperm(INPUTS)]
    if shift:
        layer.shift = WeightOffset(dtype="float32", group_size=32, scale=0.5, linears=(), base="")
        layer.weight_offset = nn.Parameter(torch.randn(INPUTS // 32, OUTPUTS), requires_grad=False)
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: filled(packed("nf4", True, bias=True)),
    "fp4": lambda: filled(packed("fp4", False)),
    "int8": lambda: filled(Packed8bit(INPUTS, OUTPUTS, bias=True, dtype=torch.float32)),
    "gptq": gptq,
    "gptq with groups of scattered inputs": lambda: gptq(ordered=True),
    "merged qa-lora": lambda: gptq(shift=True),
    "16 bits": lambda: filled(nn.Linear(INPUTS, OUTPUTS, device="meta").requires_grad_(False)),
}
LORA = {"r": 4, "lora_alpha": 12}
QA_LORA = {"r": 8, "lora_alpha": 4, "use_qalora": True, "qalora_group_size": 16}


def config_of(targets: Any, settings: dict[str, Any]) -> LoraConfig:
    config = LoraConfig(target_modules=targets, **settings)
    config._register_custom_module({nn.Linear: FusedLora})
    return config


def with_adapters(model: nn.Module, **configs: LoraConfig) -> Any:
    """A PEFT model with adapters of random matrices; the first one is active."""
    adapted: Any = None
    for name, config in configs.items():
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def one_linear(kind: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleDict({"linear": KINDS[kind]()}))
    return with_adapters(model, first=config_of(["linear"], LORA), second=config_of(["linear"], QA_LORA))


def linear_of(model: Any) -> nn.Module:
    found: nn.Module = model.base_model.model[0]["linear"]
    return found


def by_peft(model: Any, name: str, inputs: torch.Tensor) -> torch.Tensor:
    if not name:
        with model.disable_adapter():
            return linear_of(model)(inputs)  # type: ignore[no-any-return]
    model.set_adapter(name)
    found: torch.Tensor = linear_of(model)(inputs)
    return found


@pytest.fixture(params=[True, False], ids=["unpacked", "packed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for unpacked weights, or none."""
    monkeypatch.setattr(frozen, "host_memory", lambda _: (1 << 40, (1 << 40) if request.param else 1))


@torch.no_grad()
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_own_adapter(kind: str) -> None:
    model, inputs = one_linear(kind), torch.randn(6, INPUTS)
    numbers = torch.tensor([1, 0, 2, 2, 1, 0])
    each = [by_peft(model, name, inputs) for name in ("", "first", "second")]
    model.set_adapter("second")
    choice = prepare_linears(model)
    linear = linear_of(model)
    assert isinstance(linear, AnsweringLinear)
    torch.testing.assert_close(linear(inputs), each[2], **EXACT)
    for number, name in enumerate(("", *choice.names)):
        choice.only(name)
        torch.testing.assert_close(linear(inputs.clone()), each[number], **EXACT)
    choice.set_rows(numbers)
    mixed = torch.stack([each[number][row] for row, number in enumerate(numbers.tolist())])
    torch.testing.assert_close(linear(inputs.clone()[:, None])[:, 0], mixed, **EXACT)


def test_choices_for_the_rows_of_a_graph_are_written_where_it_reads_them() -> None:
    model = one_linear("nf4")
    choice = prepare_linears(model)
    (mask,) = choice._masks.values()
    choice.set_rows(torch.tensor([1, 2]))
    place = mask.of(2).data_ptr()
    choice.set_rows(torch.zeros(MOST_ROWS + 1, dtype=torch.int64))
    choice.set_rows(torch.tensor([2, 0]))
    assert mask.of(2).data_ptr() == place
    assert mask.of(2).sum(1).tolist() == [8, 0]


def test_tokens_without_a_choice_are_an_error() -> None:
    model = one_linear("nf4")
    choice = prepare_linears(model)
    choice.set_rows(torch.tensor([1, 2]))
    with pytest.raises(ModelError, match="reads 3 tokens, and 2 have adapters"):
        linear_of(model)(torch.randn(3, INPUTS))


def test_an_adapter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SpecError, match="no adapter frist"):
        prepare_linears(one_linear("nf4")).only("frist")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "bloom"])
def test_a_model_with_adapters_of_different_targets_answers_as_peft(family: str) -> None:
    model, ids = tiny_model(family), torch.arange(3, 33).view(3, 10)
    leaves = sorted({path.rpartition(".")[2] for path, each in model.model.named_modules() if type(each) is nn.Linear}
                    if family != "bloom" else {"query_key_value", "dense_h_to_4h"})  # fmt: skip
    adapted = with_adapters(model, one=config_of(leaves[:2], LORA), two=config_of(leaves, {"r": 2, "use_rslora": True}))
    each = []
    for name in ("one", "two"):
        adapted.set_adapter(name)
        each.append(adapted(input_ids=ids).logits)
    with adapted.disable_adapter():
        each.insert(0, adapted(input_ids=ids).logits)
    choice = prepare_linears(adapted)
    assert not any(isinstance(module, FusedLora) for module in adapted.modules())
    for name, logits in zip(("", *choice.names), each, strict=True):
        choice.only(name)
        torch.testing.assert_close(adapted(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    choice.set_rows(torch.tensor([2, 0, 1]).repeat_interleave(10))
    mixed = torch.stack([each[number][row] for row, number in enumerate((2, 0, 1))])
    torch.testing.assert_close(adapted(input_ids=ids).logits, mixed, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_linears_that_read_one_tensor_are_one_product() -> None:
    model = tiny_model()
    prepare_linears(model)
    layer = model.model.layers[0]
    counted = mock.Mock(wraps=torch.mm)
    with mock.patch.object(torch, "mm", counted):
        layer(torch.randn(1, 1, 64), position_embeddings=(torch.ones(1, 1, 16), torch.zeros(1, 1, 16)))
    widths = [call.args[1].shape[1] for call in counted.call_args_list]
    assert {128, 256} <= set(widths)


@torch.no_grad()
def test_a_packed_model_has_the_base_alone() -> None:
    model, ids = tiny_model(), torch.arange(3, 13)[None]
    logits = model(input_ids=ids).logits
    choice = prepare_linears(model)
    assert (choice.names, choice.reason) == ((), "")
    choice.set_rows(torch.zeros(10, dtype=torch.int64))
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_trained_tokens_stay_with_peft_and_are_for_all_rows() -> None:
    config = config_of(["q_proj"], {**LORA, "trainable_token_indices": {"embed_tokens": [5, 6]}})
    model, ids = with_adapters(tiny_model(), default=config), torch.arange(3, 13)[None]
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    adapted = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    choice = prepare_linears(model)
    assert "embed_tokens" in choice.reason
    for name, logits in (("", base), ("default", adapted)):
        choice.only(name)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match="cannot have adapters of their own"):
        choice.set_rows(torch.zeros(10, dtype=torch.int64))


@torch.no_grad()
def test_adapters_of_experts_stay_with_peft_and_are_for_all_rows() -> None:
    model = adapt(
        packed_model("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(3, 13)[None]
    logits = model.eval()(input_ids=ids).logits
    choice = prepare_linears(model)
    assert "experts" in choice.reason
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_what_would_not_fit_unpacked_stays_packed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "host_memory", lambda _: (1 << 30, 1 << 10))
    model = one_linear("nf4")
    assert "unpacked for every product" in prepare_linears(model).note
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    monkeypatch.setattr(frozen, "host_memory", lambda _: (1 << 30, 1 << 30))
    model = one_linear("nf4")
    assert prepare_linears(model).note == "nf4 weights unpacked to float32, 96.0 KiB"
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_offsets_of_a_merge_are_not_rounded_into_weights_of_16_bits() -> None:
    assert frozen.may_unpack(gptq(shift=True))  # type: ignore[arg-type]
    assert not frozen.may_unpack(gptq(shift=True, dtype=torch.bfloat16))  # type: ignore[arg-type]


@torch.no_grad()
def test_bfloat16_weights_give_the_same_products_in_onednns_order() -> None:
    layers = [nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=torch.bfloat16) for bias in (True, False)]
    inputs = torch.randn(3, INPUTS, dtype=torch.bfloat16)
    ordered, plain = (form(layers).products(inputs, None) for form in (frozen.Reordered, frozen.Unpacked))
    torch.testing.assert_close(tuple(ordered), tuple(plain), rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "fp4", "gptq", "gptq with groups of scattered inputs"])
def test_kernels_for_few_tokens_are_given_what_the_layer_multiplies(kind: str) -> None:
    layer, inputs = KINDS[kind](), torch.randn(3, INPUTS)
    member = frozen.member_of(layer)  # type: ignore[arg-type]
    assert member is not None
    torch.testing.assert_close(torch_products(inputs, [member], None)[0], layer(inputs), **EXACT)


def test_layers_without_a_kernel_are_not_given_to_one() -> None:
    layers = [gptq(shift=True), KINDS["int8"](), KINDS["16 bits"]()]
    assert [frozen.member_of(layer) for layer in layers] == [None] * 3  # type: ignore[arg-type]
