"""Merged models of experts and wrappers are whole models, with which plain transformers computes the same logits."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdist.core.errors import ModelError
from qdist.core.model.shapes import EXPERTS
from qdist.host.launch.prepare import Launch
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.merged_16bit import Merged
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.packed_folder import tensor_files
from qdist.runtime.model.classes import class_of
from qdist.runtime.quantize.tensors import outlines
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.every_model import tiny_model
from tests.runtime.gptq_files import padded as padded_tokenizer
from tests.runtime.moe_models import store_as_mxfp4
from tests.runtime.quantize.test_tensors import config_of, whole_model
from tests.runtime.tiny import VOCAB, adapted_run, logits_of, real_job, save_data

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_whole(folder: Path, family: str, **changes: Any) -> Path:
    """A model as `save_pretrained` writes it: in the hub's names, towers and all."""
    config = config_of(family, **changes)
    config.get_text_config().vocab_size = VOCAB
    whole_model(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return folder


def run_over(
    folder: Path,
    family: str,
    *,
    name: str = "run",
    experts: bool = False,
    expert_targets: tuple[str, ...] = (EXPERTS,),
    **settings: Any,
) -> tuple[RunDir, Any]:
    source = folder / "source"
    if not source.exists():
        save_whole(source, family)
    job = real_job(source, save_data(folder / "d.jsonl"), folder / name, seq_len=64, **settings)
    return adapted_run(with_experts(job, expert_targets) if experts else job)


def with_experts(job: Launch, targets: tuple[str, ...] = (EXPERTS,)) -> Launch:
    """The job with adapters on the experts too."""
    lora = msgspec.structs.replace(job.plan.spec.lora, targets=(*ATTENTION, *targets))
    spec = msgspec.structs.replace(job.plan.spec, lora=lora)
    plan = msgspec.structs.replace(job.plan, spec=spec)
    return job._replace(plan=plan, files={**job.files, PLAN: msgspec.json.encode(plan).decode()})


def plain(folder: Path) -> Any:
    from transformers import AutoConfig

    return class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_adapters_of_experts_are_folded_into_each_expert(tmp_path: Path, family: str, bits: int) -> None:
    run, trained = run_over(tmp_path, family, experts=True, bits=bits)
    expected = logits_of(trained)
    with trained.disable_adapter():
        assert (logits_of(trained) - expected).abs().max() > 0.05
    # In float32, as rounding to 16 bits would send some tokens to other experts.
    _, folded = merged_16bit.write(Adapters([run]), tmp_path / "out", onto="dequantized", dtype=torch.float32)
    assert str(folded) == "folded 8 of 8 linears, 4 of 4 expert parameters"
    assert (logits_of(plain(tmp_path / "out")) - expected).abs().max() < 1e-5


def test_experts_that_came_in_mxfp4_are_trained_as_they_are_and_merged_to_plain_matrices(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("gpt_oss").save_pretrained(source)
    padded_tokenizer().save_pretrained(source)
    store_as_mxfp4(source)
    targets = ("all-linear", EXPERTS)
    job = real_job(source, save_data(tmp_path / "d.jsonl"), tmp_path / "run", lora__targets=targets, dtype="float32")
    run, trained = adapted_run(job)
    experts = trained.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert "mxfp4" in repr(experts)
    expected = logits_of(trained)
    _, folded = merged_16bit.write(Adapters([run]), tmp_path / "out", onto="dequantized", dtype=torch.float32)
    assert str(folded) == "folded 16 of 16 linears, 8 of 8 expert parameters"
    merged = plain(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    assert (logits_of(merged) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "mistral3"])
def test_a_merged_wrapper_has_its_towers_and_keeps_its_class(tmp_path: Path, family: str, onto: Any) -> None:
    run, trained = run_over(tmp_path, family)
    source, expected = plain(tmp_path / "source"), logits_of(trained)
    _, folded = merged_16bit.write(Adapters([run]), tmp_path / "out", onto=onto, dtype=torch.float32)
    assert folded.linears == folded.all_linears > 0
    merged = plain(tmp_path / "out")
    assert type(merged) is type(source)
    changed = [name for name, value in source.state_dict().items() if not torch.equal(merged.state_dict()[name], value)]
    if onto == "original":
        assert len(changed) == folded.linears
    else:
        assert all(".layers." in name and "language_model" in name for name in changed)
        assert (logits_of(merged) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("bits", "onto"), [(4, "dequantized"), (4, "original"), (16, "dequantized")])
def test_matrices_of_gpt2_are_merged_as_its_class_holds_them(tmp_path: Path, bits: int, onto: Any) -> None:
    run, trained = run_over(tmp_path, "gpt2", bits=bits)
    _, folded = merged_16bit.write(Adapters([run]), tmp_path / "out", onto=onto, dtype=torch.float32)
    assert str(folded) == "folded 8 of 8 linears"
    distance = (logits_of(plain(tmp_path / "out")) - logits_of(trained)).abs().max()
    assert distance < (1e-5 if onto == "dequantized" else 0.5)


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_the_biases_by_which_routers_choose_are_trained_with_and_merged(tmp_path: Path, onto: Any) -> None:
    """They are buffers, zero in a new model, and in float32 beside weights in 16 bits."""
    source, data = tiny_model("glm4_moe"), save_data(tmp_path / "d.jsonl")
    source.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tiny_tokenizer(bos=False).save_pretrained(tmp_path / "source")
    run, trained = adapted_run(real_job(tmp_path / "source", data, tmp_path / "run", seq_len=64))
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    stored = plain(tmp_path / "source").get_buffer(name)
    assert stored.min() > 0.0
    assert torch.equal(trained.get_base_model().get_buffer(name), stored)
    merged_16bit.write(Adapters([run]), tmp_path / "out", onto=onto, dtype=torch.bfloat16)
    assert torch.equal(plain(tmp_path / "out").get_buffer(name), stored)


def test_a_tensor_of_an_adapter_that_is_not_folded_refuses_the_merge(tmp_path: Path) -> None:
    run, _ = run_over(tmp_path, "qwen3_moe")
    tensors = load_file(run.adapter / ADAPTER)
    tensors["base_model.model.model.vision.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, run.adapter / ADAPTER)
    with pytest.raises(ModelError, match=r"1 of 17 tensors change no weight, such as \S+vision\.q_proj\.lora_A"):
        merged_16bit.write(Adapters([run]), tmp_path / "out", onto="dequantized", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "mistral3", "qwen3_5"])
def test_a_merged_model_has_the_names_that_save_pretrained_writes(tmp_path: Path, family: str) -> None:
    run, _ = run_over(tmp_path, family)
    merged_16bit.write(Adapters([run]), tmp_path / "out", onto="dequantized", dtype=torch.bfloat16)
    sizes = [
        {name: tuple(made.shape) for name, made in outlines(folder, tensor_files(folder)).items()}
        for folder in (tmp_path / "source", tmp_path / "out")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_experts_are_merged_one_at_a_time(tmp_path: Path, onto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_over(tmp_path, "qwen3_moe", experts=True)
    whole: list[str] = []
    monkeypatch.setattr(Merged, "_experts", lambda _, name: whole.append(name))
    merged_16bit.write(Adapters([run]), tmp_path / "out", onto=onto, dtype=torch.bfloat16)
    assert not whole
