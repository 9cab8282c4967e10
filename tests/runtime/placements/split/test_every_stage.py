"""Stages and losses of any class of transformers are those of the class, whatever it does around layers and head."""

import copy
from typing import Any

import pytest
import torch

from qdist.core.errors import PlanError
from qdist.runtime.engine.head import HeadRule, head_rule
from qdist.runtime.engine.objective import hidden_states, loss_of, summed_loss
from qdist.runtime.model.parts import decoder_layers, find_parts, items_returned
from qdist.runtime.placements.split.stages import Absent, arrange_stage, keep_stage, spread
from qdist.runtime.train.setup import checkpoint_layers
from tests.runtime.every_model import tiny_model

TYPES = (
    "biogpt", "cohere2", "codegen", "ctrl", "dbrx", "falcon", "falcon_h1", "falcon_mamba", "gemma2", "gemma3",
    "glm4_moe", "gpt2", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "inkling_text", "jamba",
    "llama4_text", "mamba2", "minicpm3", "mistral3", "modernbert-decoder", "mpt", "nemotron_h", "openai-gpt", "phi",
    "qwen3_5", "rwkv", "smollm3", "xglm",
)  # fmt: skip
"""Types whose classes differ in what they do before the layers, between and behind them, and around the head."""


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny_model(request.param)
    made.config.rescale_every = 0  # RWKV's; as `skeleton` sets it
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # so that a wrong scale changes the loss
    return made


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :3], labels[1, 9:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def test_a_loss_is_that_of_the_class(model: Any) -> None:
    given = batch()
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"], use_cache=False).logits.float()
        total = summed_loss(model, given, fused=False)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), given["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def test_stages_one_behind_the_other_are_the_whole_model(model: Any) -> None:
    given, count = batch(), len(decoder_layers(model))
    cuts = (range(1), range(1, count - 1), range(count - 1, count))
    with torch.no_grad():
        hidden = given["input_ids"]
        for position, layers in enumerate(cuts):
            part = copy.deepcopy(model)
            keep_stage(part, layers, first=position == 0, last=position == 2)
            hidden = hidden_states(part, hidden)
            assert sum(not isinstance(layer, Absent) for layer in decoder_layers(part)) == len(layers)
        assert torch.equal(hidden, hidden_states(model, given["input_ids"]))
        assert torch.equal(loss_of(part, hidden, given, fused=False), summed_loss(model, given, fused=False))


def test_recomputed_layers_have_the_gradients_of_kept_ones(model: Any) -> None:
    layer = decoder_layers(model)[0]
    watched = next(parameter for parameter in layer.parameters() if parameter.dim() > 1)
    gradients = []
    for checkpointed in (False, True):
        part = copy.deepcopy(model).train()
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            part.get_base_model = lambda part=part: part
            checkpoint_layers(part, 2)
        torch.manual_seed(0)
        summed_loss(part, batch(), fused=False).backward()
        name = next(name for name, value in model.named_parameters() if value is watched)
        gradients.append(part.get_parameter(name).grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("llama", HeadRule()),
        ("granite", HeadRule(after=0.125)),
        ("cohere2", HeadRule(after=0.0625)),
        ("modernbert-decoder", HeadRule(plain=False)),
    ],
)
def test_what_a_class_does_around_its_head_is_found_out(model_type: str, rule: HeadRule) -> None:
    assert head_rule(tiny_model(model_type)) == rule


@pytest.mark.parametrize(
    ("model_type", "key", "value", "rule"),
    [
        ("granite", "logits_scaling", 8.0, HeadRule(after=0.125)),
        ("gemma2", "final_logit_softcapping", 30.0, HeadRule(softcap=30.0)),
        ("minicpm3", "dim_model_base", 16, HeadRule(before=0.25)),
        ("hyperclovax", "logits_scaling", 0.5, HeadRule(after=0.5)),
    ],
)
def test_a_scale_or_a_softcap_of_logits_is_read_off_the_class(
    model_type: str, key: str, value: float, rule: HeadRule
) -> None:
    model = tiny_model(model_type)
    setattr(model.config, key, value)
    found = head_rule(model)
    assert found._replace(softcap=None) == rule._replace(softcap=None)
    assert found.softcap == pytest.approx(rule.softcap)


@pytest.mark.parametrize("model_type", ["gemma3", "gpt2", "mistral3", "qwen3_5"])
def test_a_model_spread_over_devices_computes_the_same(model_type: str) -> None:
    model, given = tiny_model(model_type), batch()
    with torch.no_grad():
        wanted = summed_loss(model, given, fused=False)
        devices = [torch.device("cpu", 0), *[torch.device("cpu")] * (len(decoder_layers(model)) - 1)]
        spread(model, devices)
        assert torch.equal(summed_loss(model, given, fused=False), wanted)


@pytest.mark.parametrize(
    ("model_type", "items"), [("llama", 0), ("bloom", 2), ("falcon_h1", 1), ("mamba", 0), ("rwkv", 3)]
)
def test_what_a_layer_returns_is_read_from_its_source(model_type: str, items: int) -> None:
    assert items_returned(type(decoder_layers(tiny_model(model_type))[0])) == items


@pytest.mark.parametrize(
    ("model_type", "embedding", "layers", "norm", "head"),
    [
        ("gpt2", "transformer.wte", "transformer.h", "transformer.ln_f", "lm_head"),
        ("mamba", "backbone.embeddings", "backbone.layers", "backbone.norm_f", "lm_head"),
        ("dbrx", "transformer.wte", "transformer.blocks", "transformer.norm_f", "lm_head"),
        ("nemotron_h", "model.embeddings", "model.layers", "model.norm_f", "lm_head"),
        ("rwkv", "rwkv.embeddings", "rwkv.blocks", "rwkv.ln_out", "head"),
        ("openai-gpt", "transformer.tokens_embed", "transformer.h", "", "lm_head"),
        ("gemma3", "model.language_model.embed_tokens", "model.language_model.layers", "model.language_model.norm",
         "lm_head"),
    ],
)  # fmt: skip
def test_the_parts_of_a_model_are_found_in_it(
    model_type: str, embedding: str, layers: str, norm: str, head: str
) -> None:
    parts = find_parts(tiny_model(model_type))
    assert (parts.embedding, parts.layers, parts.final_norm, parts.head) == (embedding, layers, norm, head)


@pytest.mark.parametrize(
    ("unsplit", "together_from", "message"),
    [
        ("passes four streams between its layers", None, "passes four streams"),
        ("", 1, "layers from 1 on share keys and values"),
    ],
)
def test_what_cannot_be_cut_is_refused(unsplit: str, together_from: int | None, message: str) -> None:
    class _Plan:
        class source:
            new_token_ids = ()

        class facts:
            pass

        layer_map = (0, 0, 1, 1)

    _Plan.facts.unsplit, _Plan.facts.together_from = unsplit, together_from  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match=message):
        arrange_stage(_Plan(), 0)  # type: ignore[arg-type]
