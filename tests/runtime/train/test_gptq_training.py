"""LoRA on GPTQ weights: exact gradients, the same run in every placement, and what does not go together is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from qdist.core.errors import ModelError, RunError, SpecError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.telemetry.events import losses
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.infer.load import open_model
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights
from tests.runtime.conftest import TrainRun
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.merging import merge
from tests.runtime.tiny import dummy_job, real_job, save_config, save_data, save_model

CPU = torch.device("cpu")
CHECKPOINT = Gptq(shape=Shape(4, 32), sym=False, desc_act=True, format="gptq_v2")


def layer_of(bits: int, group_size: int, *, inputs: int = 64, outputs: int = 96) -> PackedGptq:
    layer = PackedGptq(
        inputs, outputs, bias=True, dtype=torch.float32, shape=Shape(bits, group_size), offset=1  # type: ignore[arg-type]
    )  # fmt: skip
    fill(nn.ModuleDict({"linear": layer}), RandomWeights(CPU, torch.float32), device=CPU)
    return layer


def test_gradients_are_those_of_finite_differences() -> None:
    layer = layer_of(4, 32, inputs=32, outputs=32)
    layer.bias.data = layer.bias.data.double()
    shapes = ((1, 3, 32), (4, 32), (32, 4))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_product(x, a, b, layer, 0.7), leaves)
    assert torch.autograd.gradcheck(layer, leaves[:1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_unpacking_and_multiplying_in_float32(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_of(bits, 32)
    matrix, outer = layer.matrix(torch.float32, CPU), torch.randn(5, 96)
    given = [torch.randn(5, 64), 0.1 * torch.randn(8, 64), 0.1 * torch.randn(96, 8)]
    exact, rounded = ([leaf.clone().requires_grad_() for leaf in given] for _ in range(2))
    x, down, up = exact
    (functional.linear(x, matrix + 0.5 * up @ down, layer.bias)).backward(outer)
    with torch.autocast("cpu", dtype=dtype):
        product = adapted_product(*rounded, layer, 0.5)
    assert product.dtype == dtype
    product.backward(outer.to(dtype))
    for near, wanted in zip(rounded, exact, strict=True):
        assert float((near.grad - wanted.grad).norm() / wanted.grad.norm()) < 1e-2


def test_packed_words_need_no_gradient_and_are_parameters() -> None:
    named = dict(layer_of(3, -1).named_parameters())
    assert {name: value.dtype for name, value in named.items()} == {
        "weight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "bias": torch.float32,
    }  # fmt: skip
    assert not any(value.requires_grad for value in named.values())


SHAPE = {"steps": 10, "global_batch": 4, "micro_batch": 1, "train.held_out": 0.2, "optim.lr": 1e-2, "lora.r": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_gptq(folder / "gptq", CHECKPOINT, num_hidden_layers=3, tokenizer=padded())


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path, folder: Path) -> RunDir:
    job = real_job(model, save_data(folder / "d.jsonl"), folder / "alone", method="gptq-lora", gpus=1, **SHAPE)
    assert job.plan.source.gptq == CHECKPOINT
    assert job.plan.source.packed == str(model)
    return train(job)


def seen(run: RunDir) -> list[float]:
    return list(losses(event for event in Follower(run.path).new_events() if event.rank == 0).values())


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("shard", {"gpus": 2, "placement": "shard"}),
        ("split", {"gpus": 2, "placement": "split", "split.schedule": "1f1b"}),
        ("replicate", {"gpus": 2, "placement": "replicate"}),
    ],
)
def test_every_placement_trains_the_same_adapter(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, name: str, grid: dict[str, object]
) -> None:
    run = train(real_job(model, folder / "d.jsonl", folder / name, method="gptq-lora", **grid, **SHAPE))
    assert len(seen(run)) == 10
    assert seen(run) == pytest.approx(seen(alone), rel=1e-4)
    assert seen(run)[-1] < seen(run)[0]


def test_a_run_is_opened_over_the_checkpoint_that_it_was_trained_on(alone: RunDir, model: Path) -> None:
    opened = open_model(alone.path)
    assert sum(isinstance(module, PackedGptq) for module in opened.model.modules()) == 3 * 7
    hidden = model.with_name("moved")
    model.rename(hidden)
    try:
        with pytest.raises(ModelError, match="which the run was trained on, is gone"):
            open_model(alone.path)
    finally:
        hidden.rename(model)


def test_an_adapter_merges_onto_the_unpacked_checkpoint(alone: RunDir, folder: Path) -> None:
    with pytest.raises(RunError, match="is a GPTQ checkpoint, which does not say which model it was made from"):
        merge(alone, folder / "merged", onto="original", dtype=torch.float16)
    found = merge(alone, folder / "merged", onto="dequantized", dtype=torch.float16)
    assert found.dequantized == pytest.approx(found.adapter, rel=1e-2)
    assert found.original is None


@pytest.mark.parametrize(
    ("settings", "error", "says", "attempt"),
    [
        ({"method": "qlora"}, SpecError, "is a GPTQ checkpoint", "--method gptq-lora"),
        ({"bits": 3}, SpecError, "has 4 bits; this run wants 3", "--bits 4"),
        (
            {"quant.group_size": 64},
            SpecError,
            "has a group size of 32; this run wants 64",
            "--set quant.group_size=128",
        ),
        ({"bits": 16}, SpecError, "gptq-lora has backbones of 2, 3, 4 or 8 bits, not 16", "--bits 4"),
        ({"quant.double": False}, SpecError, "quant.type and quant.double describe NF4", "--set quant.double=true"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model: Path, folder: Path, alone: RunDir, settings: dict[str, object], error: type[Exception], says: str,
    attempt: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=says) as caught:
        real_job(model, folder / "d.jsonl", folder / "refused", **{"method": "gptq-lora", **settings})
    assert attempt in caught.value.try_  # type: ignore[attr-defined]
    assert not (folder / "refused").exists()


def test_a_plain_model_is_refused_with_the_way_to_quantize_it(folder: Path, alone: RunDir) -> None:
    plain = save_model(folder / "plain")
    with pytest.raises(ModelError, match="is not a GPTQ checkpoint") as caught:
        real_job(plain, folder / "d.jsonl", folder / "refused", method="gptq-lora")
    assert "--method gptq" in caught.value.try_


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_random_weights_come_in_every_width(train: TrainRun, folder: Path, bits: int) -> None:
    config = save_config(folder / f"config-{bits}")
    settings = {"method": "gptq-lora", "bits": bits, "quant.group_size": 32, "steps": 3}
    run = train(dummy_job(config, folder / f"dummy-{bits}", **settings))
    assert len(seen(run)) == 3
