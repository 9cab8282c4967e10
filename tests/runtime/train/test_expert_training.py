"""Adapters of experts: trained as plain PEFT trains them, gathered, and read by PEFT and by us."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bench.models.agree import plain_losses
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.infer.load import load
from tests.runtime.engine.test_engine import advance, engine_of
from tests.runtime.every_model import tiny_model
from tests.runtime.gptq_files import padded as padded_tokenizer
from tests.runtime.moe_models import config_of, unpacked_twin
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_data

TARGETS = {"qwen3_moe": ("all-linear", "experts"), "mixtral": ("experts",), "gpt_oss": ("q_proj", "experts.down_proj")}
SHAPE: dict[str, Any] = {"seq_len": 16, "global_batch": 4, "steps": 3, "lora__r": 4, "train__held_out": 0.0}


def saved_config(folder: Path, family: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config_of(family), "max_position_embeddings": 64}))
    return folder


@pytest.mark.parametrize("family", TARGETS)
def test_a_gathered_adapter_of_experts_is_read_by_peft_and_by_us(family: str, tmp_path: Path) -> None:
    job = dummy_job(saved_config(tmp_path / "model", family), tmp_path / "run", lora__targets=TARGETS[family], **SHAPE)
    run, trained = adapted_run(job)
    ours = logits_of(trained, high=96)
    assert torch.equal(logits_of(load(run.path)[0], high=96), ours)
    twin = unpacked_twin(trained.get_base_model(), family)
    theirs = PeftModel.from_pretrained(twin, str(run.adapter)).eval()
    torch.testing.assert_close(logits_of(theirs, high=96), ours, rtol=1e-5, atol=1e-5)
    assert any(".experts." in name for name in load_file(run.adapter / ADAPTER))


def test_ten_steps_have_the_losses_of_plain_transformers_and_peft(tmp_path: Path) -> None:
    """Over the same dequantized weights, with an adapter on every expert."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    padded_tokenizer().save_pretrained(tmp_path / "base")
    data = save_data(tmp_path / "data.jsonl", 24)
    settings = {**SHAPE, "seq_len": 32, "steps": 10, "dtype": "float32", "optim__lr": 1e-2, "optim__weight_decay": 0.01}
    job = real_job(tmp_path / "base", data, tmp_path / "run", lora__targets=TARGETS["qwen3_moe"], **settings)
    engine, samples = engine_of(job.plan)
    learned = [sum(map(samples.learned, samples.step(step))) for step in range(10)]
    ours = [total / tokens for total, tokens in zip(advance(engine, samples, range(10)), learned, strict=True)]
    assert ours[-1] < 0.98 * ours[0]
    assert ours == pytest.approx(plain_losses(tmp_path / "base", job.plan), rel=1e-4)
