"""An exported adapter of experts, read back by the rules of vLLM's loader, changes each expert as ours does.

The rules, of vLLM's lora/lora_model.py, lora/utils.py and lora/model_manager.py: a tensor's module is its name without
`base_model.model.` and `lora_A.weight`; behind `.experts` it must be one that the model's checkpoint has; of every
expert gate, up and down are there; experts held together are those of `base_layer` and of the module itself.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdist.core.errors import RunError
from qdist.core.requests import Export
from qdist.runtime.exports import qalora_as_lora, vllm_adapter
from qdist.runtime.exports.update import Adapters
from tests.runtime.exports.test_merge_experts import run_over

WORDS = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
PREFIX = "base_model.model."


def loaded(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """A and B by module, and vLLM's one scaling for all of them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith(PREFIX)
        module, side, last = name.removeprefix(PREFIX).rsplit(".", 2)
        assert (side, last) in (("lora_A", "weight"), ("lora_B", "weight"))
        found.setdefault(module, {})[side] = tensor
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert not config["modules_to_save"]
    assert isinstance(config["target_modules"], list)
    return found, config["lora_alpha"] / config["r"]


def delta(pair: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    return scaling * pair["lora_B"] @ pair["lora_A"]


def exported(tmp_path: Path, family: str, targets: tuple[str, ...] = ("experts",)) -> tuple[Adapters, Any, float]:
    run, _ = run_over(tmp_path, family, experts=True, lora__alpha=6, expert_targets=targets)
    job = Export(to="vllm", runs=(str(run.path),), out=str(tmp_path / "out"))
    vllm_adapter.run(job)
    return Adapters.named_in(job), *loaded(tmp_path / "out")


def wanted(adapters: Adapters, name: str, expert: int) -> torch.Tensor:
    updates = adapters.of_experts(name)
    return torch.zeros(()) if updates is None else updates[expert].dense()


@pytest.mark.parametrize("targets", [("experts",), ("experts.down_proj",), ("experts.gate_up_proj",)])
@pytest.mark.parametrize("family", WORDS)
def test_each_expert_has_its_own_matrices(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    adapters, found, scaling = exported(tmp_path, family, targets)
    block, gate, up, down = WORDS[family]
    for layer in range(2):
        held = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            own = f"model.layers.{layer}.{block}.experts.{expert}"
            both = torch.cat([delta(found.pop(f"{own}.{each}"), scaling) for each in (gate, up)])
            first, last = (wanted(adapters, f"{held}.{name}", expert) for name in ("gate_up_proj", "down_proj"))
            assert float((both - first).abs().max()) < 1e-6
            assert float((delta(found.pop(f"{own}.{down}"), scaling) - last).abs().max()) < 1e-6
    assert set(found) == adapters.paths  # attention, under the names of its linears
    for path, pair in found.items():
        update = adapters.of(path)
        assert update is not None
        assert float((delta(pair, scaling) - update.dense()).abs().max()) < 1e-6


@pytest.mark.parametrize("targets", [("experts",), ("experts.down_proj",), ("experts.gate_up_proj",)])
def test_experts_that_a_checkpoint_holds_together_are_in_pefts_layout(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """gpt-oss: gate and up stay interleaved, as vLLM has them for it."""
    adapters, found, scaling = exported(tmp_path, "gpt_oss", targets)
    for layer in range(2):
        held = f"model.layers.{layer}.mlp.experts"
        for module, name in ((f"{held}.base_layer", "gate_up_proj"), (held, "down_proj")):
            pair = found.pop(module)
            downs = pair["lora_A"].reshape(4, -1, pair["lora_A"].shape[1])
            ups = pair["lora_B"].reshape(pair["lora_B"].shape[0], -1, 4).permute(2, 0, 1)
            for expert in range(4):
                change = delta({"lora_A": downs[expert], "lora_B": ups[expert]}, scaling)
                assert float((change - wanted(adapters, f"{held}.{name}", expert)).abs().max()) < 1e-6
    assert set(found) == adapters.paths


def test_several_adapters_of_experts_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_over(tmp_path, "qwen3_moe", experts=True, seed=seed, name=f"run-{seed}")[0] for seed in (0, 1)]
    job = Export(to="vllm", runs=tuple(str(run.path) for run in runs), weights=(0.5, -2.0), out=str(tmp_path / "out"))
    vllm_adapter.run(job)
    assert "folded 8 of 8 linears, 4 of 4 expert parameters" in capsys.readouterr().out
    found, scaling = loaded(tmp_path / "out")
    own, held = "model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts.down_proj"
    assert float((delta(found[own], scaling) - wanted(Adapters.named_in(job), held, 3)).abs().max()) < 1e-6
    with pytest.raises(RunError, match="has adapters of experts, which PEFT's layout does not hold added up"):
        qalora_as_lora.widen(Adapters.named_in(job), tmp_path / "lora")


def test_without_adapters_of_experts_there_is_nothing_to_export(tmp_path: Path) -> None:
    run, _ = run_over(tmp_path, "qwen3_moe")
    with pytest.raises(RunError, match="has no adapters of experts: vLLM reads plain LoRA") as caught:
        vllm_adapter.run(Export(to="vllm", runs=(str(run.path),), out=str(tmp_path / "out")))
    assert caught.value.try_ == f"{run.adapter} as it is"
