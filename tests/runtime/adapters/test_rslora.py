"""rsLoRA: alpha over the square root of the rank, in training, in PEFT's own hands and in every merge."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from qdist.core.errors import SpecError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.requests import Export
from qdist.host.launch import prepare
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.exports import qalora_as_lora
from qdist.runtime.exports.qalora_merge import BOUND, merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG
from qdist.runtime.infer.load import load
from tests.plans import CPU, planned
from tests.runtime.adapters.test_qa_lora import PeftsOwn
from tests.runtime.conftest import TrainRun
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.merging import merge
from tests.runtime.tiny import adapted_run, backbone_of, logits_of, real_job, save_data, save_model
from tests.runtime.train.test_gptq_training import seen
from tests.runtime.train.test_launch_end_to_end import copied, furthest

RSLORA = {"lora.variant": "rslora", "lora.alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_data(folder / "d.jsonl")
    save_model(folder / "model", tokenizer=padded())
    save_gptq(folder / "gptq", Gptq(shape=Shape(4, 32)), tokenizer=padded())
    return folder


def run_over(folder: Path, name: str, *, model: str = "model", **settings: Any) -> RunDir:
    """A run with random numbers for an adapter."""
    return adapted_run(real_job(folder / model, folder / "d.jsonl", folder / name, seq_len=64, **settings))[0]


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDir:
    return run_over(folder, "rslora", **RSLORA)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_plan_says_it_and_takes_the_memory_of_lora() -> None:
    plain, ours = (planned("llama-7b", CPU, {"lora.variant": variant}) for variant in ("lora", "rslora"))
    assert str(ours.spec.lora) == "r=64 alpha=16 (rsLoRA)"
    assert ours.ranks == plain.ranks


def test_plain_peft_computes_what_the_run_does(run: RunDir) -> None:
    config = json.loads((run.adapter / ADAPTER_CONFIG).read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 8, 4)
    peft = PeftModel.from_pretrained(backbone_of(run.plan()), run.adapter).eval()
    layer = peft.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / math.sqrt(4)
    wanted = logits_of(load(run.path)[0], high=250)
    assert error(logits_of(peft, high=250), wanted) < 1e-5
    with peft.disable_adapter():
        assert error(logits_of(peft, high=250), wanted) > 0.05


def test_gradients_in_training_are_pefts(run: RunDir) -> None:
    from qdist.runtime.adapters.attach import FusedLora

    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for layers in ({}, {nn.Linear: FusedLora}):
        config = PeftConfig.from_pretrained(run.adapter)
        config._register_custom_module(layers)
        model = PeftModel.from_pretrained(backbone_of(run.plan()), run.adapter, config=config, is_trainable=True)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wanted, found = gradients
    assert len(found) == len(wanted) == 28
    assert max(error(found[name], wanted[name]) for name in wanted) < 1e-5


@pytest.mark.parametrize("pool", ["peft", "mean"])
def test_qa_lora_takes_the_scale_and_merges_with_it(folder: Path, tmp_path: Path, pool: str) -> None:
    settings = {"method": "qa-lora", "lora.pool": pool, **RSLORA}
    run = run_over(folder, f"qa-{pool}", model="gptq", **settings)
    config = PeftConfig.from_pretrained(run.adapter)
    config._register_custom_module({nn.Linear: PeftsOwn})
    peft = PeftModel.from_pretrained(backbone_of(run.plan()), run.adapter, config=config).eval()
    wanted = logits_of(load(run.path)[0], high=250)
    assert error(logits_of(peft, high=250), wanted) < 1e-5
    merge_offsets(Adapters([run]), tmp_path / "merged")
    assert error(logits_of(load(str(tmp_path / "merged"), dtype="float32")[0], high=250), wanted) < 10 * BOUND


def test_a_merged_model_has_the_update_of_pefts_layers(run: RunDir, tmp_path: Path) -> None:
    losses = merge(run, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert losses.dequantized == pytest.approx(losses.adapter, rel=0.02)
    peft = PeftModel.from_pretrained(backbone_of(run.plan()), run.adapter).get_base_model().model.layers[1].mlp.up_proj
    update = Adapters([run]).of("model.layers.1.mlp.up_proj")
    assert update is not None
    assert torch.allclose(update.dense(), peft.get_delta_weight("default"), rtol=1e-6)


def test_adapters_of_both_scales_become_one_that_has_neither(folder: Path, run: RunDir, tmp_path: Path) -> None:
    other = run_over(folder, "lora", **{"lora.r": 8})
    out = tmp_path / "sum"
    qalora_as_lora.run(Export(to="lora", runs=(str(run.path), str(other.path)), out=str(out), weights=(1.0, 0.5)))
    layer = PeftModel.from_pretrained(backbone_of(run.plan()), out).get_base_model().model.layers[0].mlp.down_proj
    wanted = Adapters([run, other], (1.0, 0.5)).of("model.layers.0.mlp.down_proj")
    assert wanted is not None
    assert not json.loads((out / ADAPTER_CONFIG).read_text())["use_rslora"]
    assert error(layer.get_delta_weight("default"), wanted.dense()) < 1e-6


def test_it_trains_and_goes_on_with_the_same_losses(train: TrainRun, folder: Path) -> None:
    shape = {"steps": 6, "micro_batch": 2, "optim.lr": 2e-3, "train.save_steps": 2, "train.keep": 9}
    runs = {
        variant: train(real_job(folder / "model", folder / "d.jsonl", folder / f"trained-{variant}",
                                **{"lora.variant": variant, **shape}))
        for variant in ("lora", "rslora")
    }  # fmt: skip
    whole = runs["rslora"]
    assert seen(whole)[-1] < seen(whole)[0]
    assert seen(whole) != pytest.approx(seen(runs["lora"]), rel=1e-3)
    resumed = copied(whole, folder / "resumed", up_to=2)
    train(prepare.prepare_resume(resumed, {}))
    assert seen(resumed) == seen(whole)
    assert furthest(resumed, whole) == 0.0
    with pytest.raises(SpecError, match=r"lora\.variant"):
        prepare.prepare_resume(resumed, {"lora": {"variant": "lora"}})


def test_a_run_from_before_there_were_variants_is_loras(folder: Path) -> None:
    """Neither its plan nor its adapter's configuration knows of them."""
    run = run_over(folder, "now", **{"lora.alpha": 8})
    old = RunDir(folder / "before")
    shutil.copytree(run.path, old.path)
    plan, config = (json.loads(path.read_text()) for path in (old.path / PLAN, old.adapter / ADAPTER_CONFIG))
    del plan["spec"]["lora"]["variant"], config["use_rslora"]
    (old.path / PLAN).write_text(json.dumps(plan))
    (old.adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(load_file(run.adapter / ADAPTER), old.adapter / ADAPTER)  # without a seal on the configuration
    update, wanted = (Adapters([one]).of("model.layers.0.mlp.down_proj") for one in (old, run))
    assert update is not None
    assert wanted is not None
    assert torch.equal(update.dense(), wanted.dense())
    assert torch.equal(logits_of(load(old.path)[0], high=250), logits_of(load(run.path)[0], high=250))
