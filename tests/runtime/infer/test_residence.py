"""A model in several places, or waiting in host memory, says what it says in one. Here the CPU stands for GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from qdist.core.errors import PlanError, SpecError
from qdist.core.planning.inference import Footprint, Residence
from qdist.host.machine.nvml import Card, Driver
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.attach import FusedLora
from qdist.runtime.infer import residence as places
from qdist.runtime.infer.decoding import complete
from qdist.runtime.infer.load import load, load_run
from qdist.runtime.infer.residence import choose, free_bytes, move
from tests.runtime.tiny import (
    adapted_run,
    dummy_job,
    logits_of,
    real_job,
    save_config,
    save_data,
    save_model,
    tiny_model,
)

WAYS = [
    Residence(layer_gpu=(0, 1)),
    Residence(layer_gpu=(0, 0), offloaded=(1,)),
    Residence(layer_gpu=(1, 2), offloaded=(0, 1)),
]
CPU = torch.device("cpu")
TINY = Footprint(layers=(40,) * 2, waiting=(30,) * 2, staged=10, first=5, last=5, everywhere=10)


@pytest.fixture
def cpu_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU is the CPU."""
    monkeypatch.setattr(places, "device_of", lambda gpu: CPU)


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 0 is the CPU and GPU 1 has no bytes: whatever is not brought there raises an error beside what lies there."""
    monkeypatch.setattr(places, "device_of", lambda gpu: torch.device("meta") if gpu else CPU)
    monkeypatch.setattr(FusedLora, "forward", LoraLinear.forward)  # ours asks autocast, which knows no meta device


def new_rows_run(folder: Path, family: str, bits: int, *, tied: bool) -> RunDir:
    model = save_model(folder / "model", family, tie_word_embeddings=tied, vocab_size=270)
    job = real_job(
        model, save_data(folder / "d.jsonl"), folder / "run", seq_len=64, bits=bits, new_tokens=["<call>", "<return>"]
    )
    return adapted_run(job)[0]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("bloom", True)])
def test_a_run_answers_alike_wherever_it_lies(
    tmp_path: Path, cpu_gpus: None, bits: int, family: str, tied: bool
) -> None:
    run = new_rows_run(tmp_path, family, bits, tied=tied)
    model, tokenizer = load(run.path)
    prompts = [[5, 9, 30], [200, 7, 7, 41, 99, 3]]
    wanted, answers = logits_of(model, high=250), complete(model, tokenizer, prompts, max_new_tokens=8)
    for way in WAYS:
        model, _ = load_run(run, torch.float32, way)
        assert torch.equal(logits_of(model, high=250), wanted), way
        assert complete(model, tokenizer, prompts, max_new_tokens=8) == answers, way


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("new_rows", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_second_gpu_is_given_all_that_it_needs_with_and_without_a_cache(
    tmp_path: Path, meta_gpu: None, family: str, new_rows: bool
) -> None:
    if new_rows:
        run = new_rows_run(tmp_path, family, 16, tied=False)
    else:
        job = dummy_job(save_config(tmp_path / "model", family), tmp_path / "run", bits=16, train__held_out=0.0)
        run = adapted_run(job)[0]
    model, _ = load_run(run, torch.float32, Residence(layer_gpu=(0, 1)))
    assert model.device.type == "cpu"
    devices = {name: value.device.type for name, value in model.named_parameters() if "layers." in name}
    assert {device for name, device in devices.items() if "layers.0." in name} == {"cpu"}
    assert {device for name, device in devices.items() if "layers.1." in name} == {"meta"}
    assert any("lora_" in name for name, device in devices.items() if device == "meta")
    with torch.no_grad():
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        first = model(input_ids=torch.full((2, 4), 7), attention_mask=mask, use_cache=True)
        cache = first.past_key_values
        more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        second = model(input_ids=torch.full((2, 1), 8), attention_mask=more, past_key_values=cache, use_cache=True)
    assert (first.logits.device.type, second.logits.shape[1]) == ("meta", 1)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    assert {layer.keys.shape[-2] for layer in cache.layers} == {5}


@pytest.mark.parametrize("way", [Residence(), *WAYS])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_plain_model_is_moved_and_says_the_same(cpu_gpus: None, family: str, way: Residence) -> None:
    model = tiny_model(family)
    wanted = logits_of(model)
    assert torch.equal(logits_of(move(model, way)), wanted)


def test_a_plain_model_is_moved_layer_by_layer(meta_gpu: None) -> None:
    model = move(tiny_model("llama"), Residence(layer_gpu=(0, 1)))
    first, second = model.model.layers
    assert {value.device.type for value in first.parameters()} == {"cpu"}
    assert {value.device.type for value in second.parameters()} == {"meta"}
    assert logits_of(model).shape == (2, 16, model.config.vocab_size)


def gpus(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """A machine with so much free on each GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(places, "free_bytes", lambda: free)


def test_a_machine_s_free_gpus_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 10, 200)
    assert choose(TINY, device=None, max_memory_bytes=None) == Residence(layer_gpu=(1, 1))
    gpus(monkeypatch, 80, 80)
    assert choose(TINY, device=None, max_memory_bytes=None) == Residence(layer_gpu=(0, 1))
    assert choose(TINY, device=None, max_memory_bytes=70).layer_gpu == (0, 1)
    assert choose(TINY, device=None, max_memory_bytes=50).offloaded
    assert choose(TINY, device="cuda:1", max_memory_bytes=None) == Residence(layer_gpu=(1, 1))
    assert choose(TINY, device="cpu", max_memory_bytes=None) == Residence()
    with pytest.raises(PlanError, match="room for 19 B, 19 B"):
        choose(TINY, device=None, max_memory_bytes=20)
    for device in ("cuda:0", "cpu"):
        with pytest.raises(SpecError, match="max_memory"):
            choose(TINY, device=device, max_memory_bytes=20)


def test_max_memory_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(SpecError, match="max_memory"):
        choose(TINY, device=None, max_memory_bytes=20)


def test_free_bytes_are_those_of_the_card_that_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch numbers cards by speed unless told otherwise, the driver by their place on the bus."""

    class _Properties:
        def __init__(self, uuid: str) -> None:
            self.uuid = uuid

    cards = tuple(
        Card(uuid=f"GPU-{name}", position=at, name="x", total_bytes=100, free_bytes=free)
        for at, (name, free) in enumerate([("slow", 10), ("fast", 90)])
    )
    names = ["fast", "slow", "unknown"]
    fakes: dict[str, Any] = {
        "device_count": lambda: 3,
        "get_device_properties": lambda index: _Properties(names[index]),
        "memory_reserved": lambda index: 5,
        "memory_allocated": lambda index: 3,
        "mem_get_info": lambda index: (50, 100),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(places.nvml, "read", lambda: Driver(version="1", cuda=(13, 0), cards=cards))
    assert free_bytes() == (92, 12, 52)
