"""Is what a rank holds counted in its real modules, and a fault in them refused before the first step?"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from qdist.core.errors import DataError, ModelError
from qdist.core.model.shapes import Experts, Kept, LayerRun, Linear
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.inventory import STORED, UNPACKED, Inventory, Learned, lines_of
from qdist.host.launch import prepare as launcher
from qdist.host.run.rundir import RunDir
from qdist.runtime.data.batches import Samples
from qdist.runtime.data.tokenized import IGNORED, TokenizedSet, load, save
from qdist.runtime.engine.torch import Comm
from qdist.runtime.model import skeleton
from qdist.runtime.train.inventory import count_part, inventory_of, learned_of
from tests.runtime.tiny import plan_of, real_job, save_config, save_data, save_model, trainable

TrainRun = Callable[[launcher.Launch], RunDir]
Q_PROJ = "model.layers.1.self_attn.q_proj"
COMM = Comm(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("model"))


def plan(folder: Path, **settings: Any) -> Plan:
    return plan_of(folder, folder / "run", **{"gpus": 1, **settings})


def counted(plan: Plan, model: Any = None, samples: Any = None) -> Inventory:
    made, _, own = trainable(plan)
    return inventory_of(model or made, plan, samples or own, COMM)


def test_every_byte_is_counted_once(folder: Path) -> None:
    made, _, samples = trainable(plan(folder))
    found = counted(plan(folder), made, samples)
    frozen = {parameter for parameter in made.parameters() if not parameter.requires_grad}
    buffers = [buffer for name, buffer in made.named_buffers() if "nested" in name]
    assert sum(held.bytes for held in found.held) == sum(tensor.nbytes for tensor in (*frozen, *buffers))
    assert [(held.bits, held.packing or held.reason, held.modules) for held in found.held] == [
        (4, "nf4", 14), (32, "embeddings", 1), (32, "head", 1), (32, "norms", 5),
    ]  # fmt: skip
    assert (found.adapted.linears, found.adapted.of_linears, found.unpacked) == (14, 14, ())
    assert found.kernels == ("attention sdpa", "loss of torch", "norms of torch")


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"bits": 8}, "backbone  76.0 KiB in 8 bits (int8), 161 KiB in 32: "),
        ({"bits": 16}, "backbone  449 KiB in 32 bits: "),
        ({"quant__type": "fp4"}, "backbone  37.2 KiB in 4 bits (fp4), 161 KiB in 32: "),
    ],
)
def test_other_precisions_are_told_as_they_are(folder: Path, settings: dict[str, Any], first: str) -> None:
    assert next(lines_of(counted(plan(folder, **settings)))).startswith(first)


def test_adapters_on_some_linears_are_counted_out_of_all(folder: Path) -> None:
    found = counted(plan(folder, lora__targets=("q_proj", "v_proj"))).adapted
    assert (found.linears, found.of_linears) == (4, 14)


@pytest.mark.parametrize(("family", "linears"), [("opt", 12), ("bloom", 8), ("gpt_neox", 8)])
def test_biases_are_in_16_bits_and_tied_tables_are_counted_once(tmp_path: Path, family: str, linears: int) -> None:
    found = counted(plan(save_config(tmp_path, family)))
    assert found.adapted.of_linears == linears
    held = {held.packing or held.reason: held.modules for held in found.held}
    assert held["biases"] >= linears
    assert ("head" in held) == (family == "gpt_neox")
    assert held["embeddings"] == 1


def test_a_linear_left_unpacked_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = skeleton._packed

    def all_but_one(linear: nn.Linear, path: str, *more: Any) -> nn.Linear:
        return linear if path == Q_PROJ else packed(linear, path, *more)

    monkeypatch.setattr(skeleton, "_packed", all_but_one)
    with pytest.raises(ModelError, match=f"16.0 KiB of the linears .* 31.3% of .* 16 bits where 4 .*: {Q_PROJ}"):
        counted(plan(folder))


def test_an_adapter_missing_on_one_layer_is_refused(folder: Path) -> None:
    made, _, samples = trainable(plan(folder))
    layer = made.get_base_model().get_submodule(Q_PROJ)
    made.get_base_model().set_submodule(Q_PROJ, layer.base_layer)
    with pytest.raises(ModelError, match=f"1 of the 14 linears and experts .* have no adapter: {Q_PROJ}"):
        counted(plan(folder), made, samples)


def test_a_linear_that_the_plan_counts_and_the_model_lacks_is_refused(folder: Path) -> None:
    made, _, samples = trainable(plan(folder))
    made.get_base_model().set_submodule(Q_PROJ, nn.Identity())
    with pytest.raises(ModelError, match=r"1 module that the plan counts is not in .*: q_proj of model\.layers\.1"):
        counted(plan(folder), made, samples)


def test_a_linear_that_the_plan_does_not_know_counts_as_left_unpacked(folder: Path) -> None:
    made, _, _ = trainable(plan(folder))
    made.get_base_model().model.layers[0].extra = nn.Linear(64, 64).requires_grad_(False)
    strange = [module for module in count_part(made, plan(folder)).modules if module.reason == UNPACKED]
    assert [module.path for module in strange] == ["model.layers.0.extra.weight"]


def test_experts_are_told_from_their_router(folder: Path) -> None:
    """As transformers has them: 3-D parameters of one module, which nobody packed here."""
    made, _, _ = trainable(plan(folder, lora__targets=("q_proj",)))
    for layer in made.get_base_model().model.layers:
        layer.moe = nn.Module()
        layer.moe.gate = nn.Linear(64, 4, bias=False)
        layer.moe.experts = nn.Module()
        for name, shape in {"up": (4, 32, 64), "down": (4, 64, 32)}.items():
            layer.moe.experts.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        layer.moe.requires_grad_(False)
    reads: Any = ("mlp_in", "mlp_out")
    matrices = (Linear("up", 64, 32, False, reads[0]), Linear("down", 32, 64, False, reads[1]))
    routed = Experts(path="moe.experts", count=4, active=2, matrices=matrices)
    given = plan(folder, lora__targets=("q_proj",))
    shape = msgspec.structs.replace(given.facts.shapes[0], experts=routed, kept=(Kept("moe.gate", 256, "router"),))
    facts = msgspec.structs.replace(given.facts, layers=(LayerRun(shape, 2),))
    modules = count_part(made, msgspec.structs.replace(given, facts=facts)).modules
    found = {module.path: (module.kind, module.reason) for module in modules if ".0.moe." in module.path}
    assert found == {
        "model.layers.0.moe.gate.weight": ("other", "router"),
        "model.layers.0.moe.experts.up": ("expert", UNPACKED),
        "model.layers.0.moe.experts.down": ("expert", UNPACKED),
    }


_SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
_ROUTED = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_MODERN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SMALL, **_ROUTED},
    "gpt_oss": {**_SMALL, **_ROUTED, "quantization_config": {"quant_method": "mxfp4"}},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "bos_token_id": 0},
    "qwen3_5_text": {
        **_SMALL, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "targets", "adapted", "held"),
    [
        ("qwen3_moe", ("all-linear", "experts"), (8, 8, 4, 4), {"nf4": 12, "router": 2}),
        ("gpt_oss", ("all-linear",), (8, 8, 0, 4), {"mxfp4": 4, STORED: 8}),
        ("gpt_oss", ("experts",), (0, 8, 4, 4), {"mxfp4": 4, STORED: 8}),
        ("gpt2", ("all-linear",), (8, 8, 0, 0), {"nf4": 8, "biases": 8, "positions": 1}),
        ("qwen3_5_text", ("all-linear",), (13, 13, 0, 0), {"nf4": 13, "convolution": 1, "too small to pack": 2}),
    ],
)
def test_experts_hybrids_and_transposed_linears_are_counted(
    tmp_path: Path, family: str, targets: tuple[str, ...], adapted: tuple[int, ...], held: dict[str, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "eos_token_id": 1, **_MODERN[family]}))
    found = counted(plan(tmp_path, lora__targets=targets))
    assert msgspec.structs.astuple(found.adapted) == adapted
    assert found.unpacked == ()
    modules = {held.packing or held.reason: held.modules for held in found.held}
    assert {name: modules.get(name) for name in held} == held


def test_samples_are_counted_by_the_set_itself(folder: Path) -> None:
    _, _, samples = trainable(plan(folder))
    assert learned_of(samples) == Learned(samples=32, tokens=512, learned_tokens=480, records=32, none=0)


def test_data_without_a_learned_token_are_refused(folder: Path) -> None:
    made, _, samples = trainable(plan(folder))
    tokenized = samples.tokenized
    summary = msgspec.structs.replace(tokenized.summary, learned_tokens=0)
    labels = torch.full_like(tokenized.labels, IGNORED)
    nothing = TokenizedSet(tokenized.tokens, labels, tokenized.offsets, summary)
    with pytest.raises(DataError, match="none of the 512 tokens of 32 samples has a loss"):
        counted(plan(folder), made, Samples(plan(folder), nothing, pad_id=0))


def test_every_group_of_ranks_is_checked(folder: Path) -> None:
    """The second rank, with a backbone of its own, has one adapter less."""
    two = plan(folder, gpus=2, global_batch=2)
    made, _, samples = trainable(two)
    part = count_part(made, two)
    lame = part._replace(modules=tuple(module._replace(is_adapted=False) for module in part.modules))
    comm: Any = SimpleNamespace(gather=lambda own: [own, lame])
    with pytest.raises(ModelError, match="14 of the 14 linears"):
        inventory_of(made, two, samples, comm)


def test_a_rank_ends_with_these_words_and_writes_no_checkpoint(train: TrainRun, tmp_path: Path) -> None:
    """Labels were lost after the data were tokenized; of data that no other test has, as the cache is all tests'."""
    data = save_data(tmp_path / "data.jsonl", 37)
    job = real_job(save_model(tmp_path / "model"), data, tmp_path / "run", gpus=1)
    assert job.plan.data is not None
    path = Path(job.plan.data.path)
    kept = load(path, key=path.stem)
    summary = msgspec.structs.replace(kept.summary, learned_tokens=0)
    save(TokenizedSet(kept.tokens, torch.full_like(kept.labels, IGNORED), kept.offsets, summary), path, key=path.stem)
    with pytest.raises(AssertionError, match=r"error: none of the \d+ tokens of 37 samples has a loss"):
        train(job)
    assert not job.run.checkpoint_steps()
