"""A family is trained, resumed, sharded, split, merged and exported: the test to add a new family to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.model.families import FAMILIES as KNOWN
from qdist.core.requests import Export
from qdist.core.telemetry.events import losses
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports.gguf import export
from qdist.runtime.infer.load import load
from qdist.runtime.train.checkpoint import load_tensors
from tests.runtime.exports.test_merge_experts import save_whole
from tests.runtime.gptq_files import padded as padded_tokenizer
from tests.runtime.merging import merge
from tests.runtime.tiny import logits_of, padded, real_job, save_data, save_model, trainable

pytestmark = pytest.mark.slow
TrainRun = Callable[[prepare.Launch], RunDir]

FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "qwen3_moe": {"lora__targets": ("all-linear", "experts")},
    "qwen3_5": {},  # a wrapper whose decoder is a hybrid
}
"""What each family's runs have set besides `SHAPE`."""
CHANGES = {"qwen3_moe": {"num_experts": 3}}  # which two ranks cannot share evenly
SHAPE: dict[str, Any] = {
    "seq_len": 64, "global_batch": 4, "micro_batch": 1, "steps": 4, "lora__r": 4, "optim__lr": 3e-3,
    "lora__dropout": 0.0, "train__held_out": 0.2, "train__save_steps": 2, "train__keep": 9, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_data(folder / "data.jsonl")
    if request.param == "olmo2":
        return save_model(folder / request.param, request.param, tokenizer=padded_tokenizer())
    return save_whole(folder / request.param, request.param, **CHANGES.get(request.param, {}))


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path) -> RunDir:
    """One process, 4 bits."""
    return train(job_of(model, "alone", gpus=1))


def job_of(model: Path, run: str, **settings: Any) -> prepare.Launch:
    folder = model.parent
    return real_job(model, folder / "data.jsonl", folder / run, **{**SHAPE, **FAMILIES[model.name], **settings})


def losses_of(run: RunDir) -> list[float]:
    return list(losses([event for event in Follower(run.path).new_events() if event.rank == 0]).values())


def furthest(one: RunDir, other: RunDir) -> float:
    first, second = (load_tensors(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("placement", ["shard", "split"])
def test_two_ranks_train_the_adapter_of_one(train: TrainRun, model: Path, alone: RunDir, placement: str) -> None:
    run = train(job_of(model, placement, gpus=2, placement=placement))
    assert run.plan().gpus_per_group == 2
    assert len(losses_of(alone)) == 4
    assert losses_of(run) == pytest.approx(losses_of(alone), rel=1e-4)
    assert furthest(run, alone) < 1e-4


@pytest.mark.parametrize("bits", [8, 16])
def test_it_learns_in_other_numbers_of_bits_too(model: Path, bits: int) -> None:
    _, adapter, _ = trainable(job_of(model, f"bits-{bits}", gpus=1, bits=bits).plan)
    optimizer, found = torch.optim.Adam(adapter.parameters(), 1e-2), []
    for _ in range(4):
        loss = adapter(padded([24, 17, 9]))
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sorted(found, reverse=True) == found
    assert found[-1] < 0.99 * found[0]


def test_killed_behind_a_checkpoint_and_resumed_it_ends_with_the_same_numbers(
    train: TrainRun, model: Path, alone: RunDir
) -> None:
    resumed = RunDir(model.parent / "resumed")
    shutil.copytree(alone.path, resumed.path)
    (resumed.path / "result.json").unlink()
    shutil.rmtree(resumed.adapter)
    shutil.rmtree(resumed.checkpoint(4))
    train(prepare.prepare_resume(resumed, {}))
    assert losses_of(resumed) == losses_of(alone)
    assert furthest(resumed, alone) == 0.0


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_merged_it_says_what_the_adapter_says(model: Path, alone: RunDir, tmp_path: Path, onto: str) -> None:
    from transformers import AutoModelForCausalLM

    if onto == "original" and model.name == "qwen3_5":
        pytest.skip("test_merge_experts.py merges wrappers onto their original")
    merged = merge(alone, tmp_path / "merged", onto=onto, dtype=torch.bfloat16)
    if onto == "dequantized":
        wanted = logits_of(load(alone.path)[0], high=250)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        error = (logits_of(plain, high=250) - wanted).norm() / wanted.norm()
        assert error < 8 * 2.0**-8  # of bfloat16
    assert getattr(merged, onto) == pytest.approx(merged.adapter, rel=0.05)


def test_as_a_gguf_file_it_is_read_back_as_it_was_written(
    model: Path, alone: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model.name not in KNOWN or not KNOWN[model.name].gguf:
        pytest.skip("no GGUF names")
    export.run(Export(to="gguf", runs=(str(alone.path),), out=str(tmp_path / "model.gguf"), type="f16"))
    assert "read back: no weight is further" in capsys.readouterr().out
