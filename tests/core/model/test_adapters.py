"""QA-LoRA pools what its checkpoint's groups allow, in three conventions that PEFT can all load."""

from typing import Any

import pytest

from qdist.core.errors import SpecError
from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.qa_lora import QaLoraMethod, alphas, factor_of
from qdist.core.model.adapters.registry import ADAPTERS, adapter_parameters
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.gptq import Gptq, Override, Shape
from qdist.core.model.shapes import ModelFacts
from qdist.core.spec.run_spec import RunSpec, nest, resolve

GROUPS_OF_32 = Gptq(shape=Shape(4, 32))


def spec_of(**settings: Any) -> RunSpec:
    return resolve(nest({"model": "m", "method": "qa-lora", **settings}))


def facts_of(alias: str) -> ModelFacts:
    return from_config(config_of(alias), name=alias)


def adapter_of(spec: RunSpec, gptq: Gptq, facts: ModelFacts) -> LoraMethod:
    return ADAPTERS[spec.method].of_run(spec, gptq, facts)


@pytest.mark.parametrize(
    ("alias", "millions"), [("llama-7b", 89.3), ("llama-13b", 139.9), ("llama-33b", 272.4), ("llama-65b", 446.5)]
)
def test_adapters_have_the_published_sizes(alias: str, millions: float) -> None:
    """QA-LoRA, table 2 of the paper: r=64 on all linears, groups of 32."""
    count = adapter_parameters(facts_of(alias), 64, ("all-linear",), QaLoraMethod(32))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_inputs_are_pooled_by_the_gptq_group_unless_one_says_otherwise() -> None:
    facts = facts_of("llama-7b")
    assert adapter_of(spec_of(), GROUPS_OF_32, facts) == QaLoraMethod(32)
    assert adapter_of(spec_of(**{"lora.pool_group_size": 128}), GROUPS_OF_32, facts) == QaLoraMethod(128)
    mixed = Gptq(shape=Shape(4, 32), overrides=(Override("x", Shape(4, 64)), Override("y", None)))
    assert adapter_of(spec_of(), mixed, facts) == QaLoraMethod(64)
    assert adapter_of(resolve({"method": "gptq-lora"}), GROUPS_OF_32, facts) == LoraMethod()


@pytest.mark.parametrize(
    ("gptq", "settings", "said", "attempt"),
    [
        (Gptq(shape=Shape(4, 32), desc_act=True), {}, "scattered inputs", "--method gptq-lora"),
        (Gptq(shape=Shape(4, -1)), {}, "without groups", "--group-size 32"),
        (GROUPS_OF_32, {"lora.pool_group_size": 48}, "is not a multiple of m's groups of 32", "pool_group_size=64"),
        (GROUPS_OF_32, {"lora.pool_group_size": 512}, "11008 inputs, which groups of 512", "a smaller lora.pool"),
    ],
)
def test_a_pool_that_could_not_be_merged_is_refused(gptq: Gptq, settings: dict, said: str, attempt: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        adapter_of(spec_of(**settings), gptq, facts_of("llama-7b"))
    assert attempt in str(caught.value.try_)


def test_a_linear_that_its_group_does_not_divide_is_named() -> None:
    with pytest.raises(SpecError, match="q_proj of m has 576 inputs, which groups of 128 do not divide") as caught:
        adapter_of(spec_of(), Gptq(shape=Shape(4, 128)), facts_of("smollm2-135m"))
    assert caught.value.try_ == "a GPTQ checkpoint with --group-size 64"


@pytest.mark.parametrize(("pool", "factor"), [("peft", 128 / 32), ("mean", 1 / 32), ("sum", 1.0)])
def test_a_convention_is_a_factor_on_the_sum_of_a_group(pool: Any, factor: float) -> None:
    assert factor_of(pool, 4096, 32) == pytest.approx(factor)
    spec, facts = spec_of(**{"lora.pool": pool, "lora.alpha": 8}), facts_of("llama-7b")
    by_leaf = alphas(spec, facts.linears, 32)
    for linear in facts.linears:
        peft = by_leaf[linear.name] * (linear.inputs // 32) / 32
        assert peft == pytest.approx(8 * factor_of(pool, linear.inputs, 32))


@pytest.mark.parametrize("key", ["lora.pool", "lora.pool_group_size"])
@pytest.mark.parametrize("method", ["qlora", "gptq-lora"])
def test_pooling_is_refused_where_nothing_is_pooled(key: str, method: str) -> None:
    with pytest.raises(SpecError, match="describe QA-LoRA") as caught:
        resolve(nest({"method": method, key: "sum" if key == "lora.pool" else 32}))
    assert caught.value.try_ == "--method qa-lora"
