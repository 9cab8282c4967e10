"""Random backbones have their decoder linears packed, at the bytes that were predicted, the same every time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.planning.memory import TrainingShape, packed_layer_bytes
from qdist.runtime.model.packed import Packed4bit, Packed8bit
from tests.runtime.tiny import FAMILIES, backbone_of, logits_of, plan_of, real_job, save_config, save_data, save_model

KINDS = [("nf4", 4, True), ("nf4", 4, False), ("fp4", 4, True), ("int8", 8, True), ("16-bit", 16, True)]


def settings(name: str, bits: int, double: bool) -> dict[str, Any]:
    return {"bits": bits, **({"quant__type": name, "quant__double": double} if bits == 4 else {})}


def random_backbone(folder: Path, family: str, kind: tuple[str, int, bool], **more: Any) -> tuple[Any, Any]:
    plan = plan_of(save_config(folder / "model", family), folder / "run", **settings(*kind), **more)
    return backbone_of(plan), plan


def held_bytes(module: torch.nn.Module) -> int:
    """Weights, and what their quantization needs to undo itself."""
    nested = [buffer for name, buffer in module.named_buffers() if ".nested_" in name]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *nested])


def layers(model: Any) -> Any:
    decoder = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox"])
def test_every_decoder_linear_is_packed_and_nothing_else_is(
    tmp_path: Path, family: str, kind: tuple[str, int, bool]
) -> None:
    model, plan = random_backbone(tmp_path, family, kind)
    packed_type = {4: Packed4bit, 8: Packed8bit, 16: torch.nn.Linear}[plan.spec.bits]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in linears if name.rpartition(".")[2] in plan.facts.linear_names}
    assert len(inside) == 2 * len(plan.facts.linears)
    assert all(type(linears[name]) is packed_type for name in inside)
    assert all(type(linears[name]) is torch.nn.Linear for name in linears.keys() - inside)
    if plan.spec.bits == 4:
        assert {linears[name].kind for name in inside} == {kind[0]}
        assert {linears[name].weight.dtype for name in inside} == {torch.uint8}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_holds_exactly_the_bytes_that_were_predicted(
    tmp_path: Path, family: str, kind: tuple[str, int, bool]
) -> None:
    model, plan = random_backbone(tmp_path, family, kind, dtype="bfloat16")
    job = TrainingShape(
        bits=kind[1], double_quant=kind[2], compute_bytes=2, rank_r=1, targets=("all-linear",), seq_len=8
    )  # type: ignore[arg-type]
    predicted = packed_layer_bytes(plan.facts.shapes[0], job)
    assert [held_bytes(layer) for layer in layers(model)] == [predicted] * 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_whole_model_holds_exactly_the_bytes_that_were_planned(tmp_path: Path, kind: tuple[str, int, bool]) -> None:
    model, plan = random_backbone(tmp_path, "llama", kind)
    assert held_bytes(model) == plan.ranks[0].expected[0].weights


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_weights_come_every_time_and_give_finite_logits(tmp_path: Path, kind: tuple[str, int, bool]) -> None:
    first, _ = random_backbone(tmp_path / "a", "llama", kind)
    again, _ = random_backbone(tmp_path / "b", "llama", kind)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        logits = first(torch.arange(16)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_saved_model_is_packed_as_a_random_one_is(tmp_path: Path, kind: tuple[str, int, bool]) -> None:
    from qdist.core.planning.plan import Source
    from qdist.runtime.model.skeleton import load_backbone

    random, plan = random_backbone(tmp_path, "llama", kind)
    folder = save_model(tmp_path / "saved")
    source = Source(kind="folder", path=str(folder), config=plan.source.config, tokenizer="")
    saved = load_backbone(
        source,
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=torch.float32,
        device=torch.device("cpu"),
        facts=plan.facts,
    )
    assert held_bytes(saved) == held_bytes(random)
    assert [type(module) for module in saved.modules()] == [type(module) for module in random.modules()]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_tied_tables_stay_one(tmp_path: Path, family: str) -> None:
    plan = plan_of(save_config(tmp_path / "model", family, tie_word_embeddings=True), tmp_path / "run")
    model = backbone_of(plan)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_in_16_bits_and_float32_arithmetic_it_is_plain_transformers_to_the_last_bit(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model", family)
    job = real_job(folder, save_data(tmp_path / "data.jsonl"), tmp_path / "run", bits=16, dtype="float32", seq_len=64)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    high = plain.config.vocab_size
    ours = logits_of(backbone_of(job.plan), high=high)[..., :high]
    assert torch.equal(ours, logits_of(plain, high=high))
