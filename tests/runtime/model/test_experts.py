"""Experts compute what transformers' own do, one by one, from the same weights."""

from typing import Any

import pytest
import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.runtime.kernels.grouped import Pairs, outer_products, products
from qdist.runtime.model.experts import compute_experts, first_name, is_experts, matrices_of
from qdist.runtime.model.packed import PackedLinear
from qdist.runtime.model.packed_experts import PackedMatrices
from qdist.runtime.model.skeleton import offload
from tests.runtime.moe_models import CONFIGS, HIDDEN, VOCAB, facts_of_experts, packed_model, plain_model, unpacked_twin

FAMILIES = tuple(CONFIGS)


def passes(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embeddings."""
    inputs = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    logits.backward(torch.sin(torch.arange(logits.numel())).view_as(logits))
    assert inputs.grad is not None
    return logits.detach(), inputs.grad


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_logits_and_gradients_are_those_of_transformers_experts(family: str, bits: int) -> None:
    model = packed_model(family, bits=bits)
    packed = [module for module in model.modules() if isinstance(module, PackedMatrices)]
    assert len(packed) == (0 if bits == 16 else 2 * len(facts_of_experts(family).experts))
    for ours, theirs in zip(passes(model), passes(unpacked_twin(model, family)), strict=True):
        same(ours, theirs)


def test_a_checkpoint_in_mxfp4_stays_so() -> None:
    model = packed_model("gpt_oss", mxfp4=True)
    assert {module.kind for module in model.modules() if isinstance(module, PackedMatrices)} == {"mxfp4"}
    assert not any(isinstance(module, PackedLinear) for module in model.modules())  # nor do its linears change
    for ours, theirs in zip(passes(model), passes(unpacked_twin(model, "gpt_oss")), strict=True):
        same(ours, theirs)


def test_the_router_is_not_packed() -> None:
    model = packed_model("qwen3_moe")
    assert model.get_submodule("model.layers.0.mlp.gate").weight.dtype == torch.float32


def experts_passes(module: Any, tokens: int, index: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weights = torch.rand(index.shape, generator=generator).requires_grad_()
    output = module(hidden, index, weights)
    output.backward(torch.cos(torch.arange(output.numel())).view_as(output))
    assert hidden.grad is not None
    assert weights.grad is not None
    return [output.detach(), hidden.grad, weights.grad]


@pytest.mark.parametrize("index", [[[3, 1]], [[0, 1], [1, 0], [0, 3]], [[2, 2]] * 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_without_tokens_and_single_tokens_are_computed_alike(family: str, index: list[list[int]]) -> None:
    model = packed_model(family)
    path = next(iter(facts_of_experts(family).experts))
    twin = unpacked_twin(model, family)
    chosen = torch.tensor(index)
    results = [experts_passes(each.get_submodule(path), len(index), chosen) for each in (model, twin)]
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


def test_what_is_kept_for_the_backward_pass_is_what_the_gate_reads() -> None:
    model = packed_model("qwen3_moe")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    kept: list[torch.Tensor] = []
    hidden, weights = torch.randn(5, HIDDEN, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda held: held):
        experts(hidden, index, weights)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(5, 2), (5, 2), (10, 192)]


def test_offloaded_experts_are_marked_with_their_linears() -> None:
    for bits in (4, 16):
        model = packed_model("qwen3_moe", bits=bits)
        offload(model, [1])
        marked = {path for path, module in model.named_modules() if getattr(module, "offloaded", False)}
        held = "" if bits == 16 else ".gate_up_proj"
        assert f"model.layers.1.mlp.experts{held}" in marked
        assert not any(path.startswith("model.layers.0") for path in marked)


def test_experts_of_another_kind_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.mlp is a Linear"):
        compute_experts(nn.Linear(2, 2), "layers.0.mlp")


def test_experts_know_their_first_product() -> None:
    assert first_name(plain_model("mixtral").model.layers[0].mlp.experts) == "gate_up_proj"
    ungated = packed_model("nemotron_h")
    path = next(iter(facts_of_experts("nemotron_h").experts))
    assert first_name(ungated.get_submodule(path)) == "up_proj"
    assert is_experts(ungated.get_submodule(path))
    assert matrices_of(ungated.get_submodule(path), "up_proj").shape == (4, 96, HIDDEN)


def test_pairs_are_sorted_by_expert_and_summed_by_token() -> None:
    pairs = Pairs(torch.tensor([[2, 0], [0, 1], [2, 0]]), 4)
    assert pairs.experts.tolist() == [0, 0, 0, 1, 2, 2]
    assert (pairs.order // 2).tolist() == [0, 1, 2, 1, 0, 2]
    assert pairs.ends.tolist() == [3, 4, 6, 6]
    assert [span.group for span in pairs.occupied] == [0, 1, 2]
    rows = torch.arange(6.0).unsqueeze(1)
    assert pairs.summed(rows).flatten().tolist() == [0 + 4, 1 + 3, 2 + 5]


def test_products_by_group_are_those_of_each_group() -> None:
    pairs = Pairs(torch.tensor([[2, 0], [0, 1], [2, 0]]), 4)
    rows, matrices, others = torch.randn(6, 5), torch.randn(4, 5, 3), torch.randn(6, 2)
    expected = torch.stack([row @ matrices[expert] for row, expert in zip(rows, pairs.experts, strict=True)])
    torch.testing.assert_close(products(rows, matrices, pairs), expected)
    outer = torch.zeros(4, 5, 2)
    for row, other, expert in zip(rows, others, pairs.experts, strict=True):
        outer[expert] += row.unsqueeze(1) * other
    torch.testing.assert_close(outer_products(rows, others, pairs), outer)


def test_the_vocabulary_of_the_tiny_models_is_used() -> None:
    assert passes(packed_model("mixtral"))[0].shape == (2, 7, VOCAB)
