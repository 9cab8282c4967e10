"""Samples that share a row have the losses and gradients of rows of their own, in every family that packs."""

import copy
from typing import Any

import msgspec
import pytest
import torch

from qdist.core.errors import JobError
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.planning.packing import packs_samples
from qdist.runtime.data.batches import collate, collate_bin
from qdist.runtime.data.bins import BinSize
from qdist.runtime.engine.objective import boundaries_of, hidden_states, summed_loss
from qdist.runtime.model.apart import block_mask, keep_samples_apart, require_apart
from qdist.runtime.model.classes import content_of
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.placements.split.stages import keep_stage
from qdist.runtime.train.setup import checkpoint_layers
from tests.runtime.every_model import LAYERS, tiny_config, tiny_model
from tests.runtime.tiny import samples_of

OWN_CODE = "baichuan"
"""The family whose class is not in transformers."""
KNOWN = tuple(kind for kind in FAMILIES if kind != OWN_CODE)
LENGTHS = [20, 9, 3, 16]
"""Two are longer than the windows of tiny models, which are 8."""
SIZE = BinSize(positions=64, samples=5)


def reason_of(kind: str) -> str:
    return packs_samples(from_config(content_of(tiny_config(kind)), name=kind))


PACKING = tuple(kind for kind in KNOWN if not reason_of(kind))


def losses_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch, fused=False, longest=max(LENGTHS))
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", PACKING)
def test_a_packed_row_has_the_losses_and_gradients_of_its_samples_alone(kind: str) -> None:
    """And an empty one, which a rank may have so that it has as many as the others, adds nothing."""
    model, tokenized = tiny_model(kind), samples_of(LENGTHS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # so that attention prefers some tokens clearly
    alone = losses_and_gradients(model, [collate([index], tokenized, pad_id=2) for index in range(4)])
    keep_samples_apart(model)
    bins = [collate_bin(own, tokenized, pad_id=2, size=SIZE, longest=20) for own in ([2, 0, 3, 1], [])]
    packed = losses_and_gradients(model, bins)
    require_apart(model)
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert packed[1].keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        scale = float(gradient.abs().max())
        assert float((packed[1][name] - gradient).abs().max()) <= 1e-5 * max(1.0, scale), name


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gemma3"])
def test_stages_keep_samples_apart_as_the_whole_model_does(kind: str) -> None:
    model = tiny_model(kind)
    keep_samples_apart(model)
    batch, count = collate_bin([2, 0, 3], samples_of(LENGTHS), pad_id=2, size=SIZE, longest=20), LAYERS
    boundaries = boundaries_of(batch, torch.device("cpu"), longest=20)
    with torch.no_grad():
        hidden = batch["input_ids"]
        for position, layers in enumerate((range(1), range(1, count - 1), range(count - 1, count))):
            part = copy.deepcopy(model)
            keep_stage(part, layers, first=position == 0, last=position == 2)
            hidden = hidden_states(part, hidden, boundaries)
            require_apart(part)
        assert torch.equal(hidden, hidden_states(model, batch["input_ids"], boundaries))


def test_recomputed_layers_know_the_boundaries_of_their_own_micro_batch() -> None:
    """Two are in flight, as in a pipeline: the first one's layers are recomputed once the second has gone through."""
    model, tokenized = tiny_model("llama").train(), samples_of(LENGTHS)
    keep_samples_apart(model)
    batches = [collate_bin(own, tokenized, pad_id=2, size=SIZE, longest=20) for own in ([0, 1], [2, 3])]
    kept = losses_and_gradients(model, batches)
    model.get_base_model = lambda: model
    checkpoint_layers(model, LAYERS)
    model.zero_grad()
    losses = [summed_loss(model, batch, fused=False, longest=20) for batch in batches]
    for loss in losses:
        loss.backward()
    assert float(sum(losses).detach()) == kept[0]
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in kept[1].items())


def test_most_families_pack_and_the_others_say_why_not() -> None:
    others = {kind: reason for kind in KNOWN if (reason := reason_of(kind))}
    assert set(PACKING) >= {"llama", "mistral", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "mixtral", "deepseek_v3"}
    assert {kind: reason.split()[0] for kind, reason in others.items()} == {
        "bloom": "writes", "gemma2": "writes", "gpt_oss": "has", "qwen3_5": "has", "qwen3_5_text": "has",
        "qwen3_5_moe": "has", "qwen3_5_moe_text": "has", "qwen3_next": "has",
    }  # fmt: skip
    described = facts_of(content_of(tiny_config("gptj")), name="gptj")
    assert "nobody has seen" in packs_samples(described)
    wide = from_config(content_of(tiny_config("gemma3_text")), name="wide")
    runs = tuple(
        msgspec.structs.replace(run, shape=msgspec.structs.replace(run.shape, head_dim=512)) for run in wide.layers
    )
    assert "heads of 512" in packs_samples(msgspec.structs.replace(wide, layers=runs))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_and_rows_of_one_sample_are_those_of_the_class(kind: str) -> None:
    """What a finished run answers, by the model that it trained."""
    model = tiny_model(kind)
    ids = torch.arange(5, 17).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    logits, answers = model(input_ids=ids, attention_mask=mask).logits, model.generate(**given)
    keep_samples_apart(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[:, 2:], logits[:, 2:])
    assert torch.equal(model.generate(**given), answers)


def test_a_layer_that_passes_no_boundaries_on_is_noticed() -> None:
    model = tiny_model("llama")
    keep_samples_apart(model)
    layer = decoder_layers(model)[1]
    forward = layer.forward
    layer.forward = lambda *given, cu_seq_lens_q=None, **named: forward(*given, **named)
    batch = collate_bin([0], samples_of(LENGTHS), pad_id=2, size=SIZE, longest=20)
    with torch.no_grad():
        hidden_states(model, batch["input_ids"], boundaries_of(batch, torch.device("cpu")))
    with pytest.raises(JobError, match="see each other in layer 1: LlamaDecoderLayer"):
        require_apart(model)


def test_a_mask_of_a_row_has_a_block_a_segment() -> None:
    ends = torch.tensor([0, 3, 4, 6, 6], dtype=torch.int32)
    assert block_mask(ends, 6, 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert block_mask(ends, 6, 2)[2].int().tolist() == [0, 1, 1, 0, 0, 0]
