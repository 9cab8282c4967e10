"""QA-LoRA: exact gradients, PEFT's own result, the same run in every placement."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn
from torch.nn import functional

from qdist.core.errors import SpecError
from qdist.core.model.adapters.qa_lora import factor_of
from qdist.core.model.gptq import Gptq, Shape
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.load import load
from tests.runtime.conftest import TrainRun
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import adapted_run, backbone_of, logits_of, real_job, save_data, trainable
from tests.runtime.train.test_gptq_training import layer_of, seen

CHECKPOINT = Gptq(shape=Shape(4, 32), sym=False, format="gptq_v2")
SHAPE = {"steps": 10, "global_batch": 4, "micro_batch": 1, "train.held_out": 0.2, "optim.lr": 2e-3, "lora.r": 4}
"""At a rate of 1e-2 the roundings of ten steps grow to 3e-4."""
POOLS = ("peft", "mean", "sum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    save_data(folder / "d.jsonl")
    return save_gptq(folder / "gptq", CHECKPOINT, num_hidden_layers=3, tokenizer=padded())


def qa_run(model: Path, run: Path, **settings: Any) -> RunDir:
    """A run with random numbers for an adapter."""
    return adapted_run(real_job(model, run.with_name("d.jsonl"), run, method="qa-lora", **settings))[0]


def test_gradients_are_those_of_finite_differences() -> None:
    layer = layer_of(4, 32, inputs=64, outputs=32)
    layer.bias.data = layer.bias.data.double()
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 64), (4, 2), (32, 4))]
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_product(x, a, b, layer, 0.7), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_of(4, 32)
    matrix, outer = layer.matrix(torch.float32, torch.device("cpu")), torch.randn(5, 96)
    given = [torch.randn(5, 64), torch.randn(8, 2), 0.1 * torch.randn(96, 8)]
    exact, rounded = ([leaf.clone().requires_grad_() for leaf in given] for _ in range(2))
    x, down, up = exact
    wide = (up @ down).repeat_interleave(32, dim=1) / 32
    functional.linear(x, matrix + 0.5 * wide, layer.bias).backward(outer)
    with torch.autocast("cpu", dtype=dtype):
        product = adapted_product(*rounded, layer, 0.5)
    product.backward(outer.to(dtype))
    for near, wanted in zip(rounded, exact, strict=True):
        assert float((near.grad - wanted.grad).norm() / wanted.grad.norm()) < 1e-2


class PeftsOwn(LoraLinear):
    """PEFT's layer with PEFT's QA-LoRA, computed by PEFT; its own code offers it on GPTQModel's layers alone."""

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        return QALoraLinearVariant()


@pytest.mark.parametrize("pool", POOLS)
def test_peft_loads_every_convention_and_computes_the_same(model: Path, folder: Path, pool: str) -> None:
    run = qa_run(model, folder / pool, **{"lora.pool": pool})
    config = PeftConfig.from_pretrained(run.adapter)
    assert config.use_qalora
    assert config.qalora_group_size == 32
    config._register_custom_module({nn.Linear: PeftsOwn})
    peft = PeftModel.from_pretrained(backbone_of(run.plan()), run.adapter, config=config).eval()
    own, base = load(run.path)[0], load(str(model), dtype="float32")[0]
    wanted = logits_of(own, high=250)
    assert float((logits_of(peft, high=250) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((logits_of(base, high=250) - wanted).abs().max() / wanted.abs().max()) > 0.05


@pytest.mark.parametrize(("pool", "factor"), [("peft", 2 / 32), ("mean", 1 / 32), ("sum", 1.0)])
def test_the_update_is_what_the_convention_says(model: Path, folder: Path, pool: str, factor: float) -> None:
    """dW = alpha / r * factor * B A, each column of A for 32 inputs; q_proj has 64 of them."""
    run = qa_run(model, folder / f"{pool}-update", **{"lora.pool": pool, "lora.alpha": 8})
    path = "model.layers.0.self_attn.q_proj"
    update = Adapters([run]).of(path)
    assert update is not None
    (term,) = update.terms
    wanted = 8 / 4 * factor * (term.up @ term.down)
    assert torch.allclose(update.pooled(32).t(), wanted, rtol=1e-6)
    assert torch.equal(update.dense(), update.pooled(32).t().repeat_interleave(32, dim=1))
    assert torch.equal(update.pooled(16), update.pooled(32).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("pool", POOLS)
def test_a_column_starts_as_the_sum_of_its_inputs_columns(model: Path, folder: Path, pool: Any) -> None:
    """LoRA's A is drawn between -1 and 1 by the root of the inputs; of 32 such numbers the deviations add up."""
    job = real_job(model, folder / "d.jsonl", folder / f"{pool}-start", method="qa-lora", **{"lora.pool": pool})
    drawn = {name: p.detach() for name, p in trainable(job.plan)[0].named_parameters() if ".lora_A." in name}
    for name, down in drawn.items():
        inputs = 128 if "down_proj" in name else 64
        assert down.shape == (4, inputs // 32)
        on_sums = factor_of(pool, inputs, 32) * down
        assert 0.5 < float(on_sums.abs().max()) / (32 / inputs) ** 0.5 <= 1 + 1e-6


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path, folder: Path) -> RunDir:
    job = real_job(model, folder / "d.jsonl", folder / "alone", method="qa-lora", gpus=1, **SHAPE)
    assert job.plan.pool == 32
    return train(job)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("shard", {"gpus": 2, "placement": "shard"}),
        ("split", {"gpus": 2, "placement": "split", "split.schedule": "1f1b"}),
        ("replicate", {"gpus": 2, "placement": "replicate", "zero.stage": 2}),
    ],
)
def test_every_placement_trains_the_same_adapter(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, name: str, grid: dict[str, object]
) -> None:
    run = train(real_job(model, folder / "d.jsonl", folder / name, method="qa-lora", **grid, **SHAPE))
    assert len(seen(run)) == 10
    assert seen(run) == pytest.approx(seen(alone), rel=1e-4)
    assert seen(run)[-1] < seen(run)[0]


def test_a_run_trains_what_it_can_merge_or_nothing(folder: Path) -> None:
    scattered = save_gptq(folder / "scattered", Gptq(shape=Shape(4, 32), desc_act=True))
    with pytest.raises(SpecError, match="scattered inputs, which qa-lora cannot pool"):
        real_job(scattered, folder / "d.jsonl", folder / "refused", method="qa-lora")
    assert not (folder / "refused").exists()


def test_the_adapter_says_how_it_pools(alone: RunDir) -> None:
    from safetensors import safe_open

    config = json.loads((alone.adapter / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"], config["alpha_pattern"]) == (True, 32, {})
    with safe_open(alone.adapter / "adapter_model.safetensors", framework="pt") as handle:
        said = {"format": "pt", "pool": "peft", "pool_group_size": "32", "step": "10", "steps": "10"}
        assert handle.metadata().items() >= said.items()
