"""A run in use on real GPUs: on one, over two, and with layers in pinned host memory it says the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import PlanError
from qdist.core.planning.inference import USABLE_SHARE, Footprint, Residence, footprint
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES
from qdist.core.text import GIB
from qdist.host.run.rundir import RunDir
from qdist.runtime.infer import residence as places
from qdist.runtime.infer.decoding import complete
from qdist.runtime.infer.load import load, load_run, open_model
from qdist.runtime.infer.plain import _WORK_BYTES, open_plain
from qdist.runtime.model.packed import is_offloaded
from qdist.runtime.model.parts import decoder_layers
from tests.runtime.merging import merge
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model

WIDE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "initializer_range": 0.05,
}  # fmt: skip
ONE = Residence(layer_gpu=(0,) * 4)
TWO = Residence(layer_gpu=(0, 0, 1, 1))
WAITING = Residence(layer_gpu=(0,) * 4, offloaded=(1, 3))
BOTH = Residence(layer_gpu=(0, 0, 1, 1), offloaded=(0, 3))
PROMPTS = [[5, 9, 30], [200, 7, 7, 41, 99, 3, 12, 150, 31]]
KINDS = [(4, False), (4, True), (8, False), (16, False), (16, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield tmp_path_factory.mktemp("runs")


def adapted(folder: Path, bits: int, *, tied: bool) -> RunDir:
    """A run with new rows of the vocabulary, made once."""
    name = f"{bits}-{'tied' if tied else 'untied'}"
    run = RunDir(folder / name)
    if not run.adapter.is_dir():
        model = save_model(folder / f"model-{name}", **WIDE, tie_word_embeddings=tied, vocab_size=270)
        settings: dict[str, Any] = {"bits": bits, "gpus": 1, "dtype": "bfloat16", "seq_len": 64}
        job = real_job(model, save_data(folder / "d.jsonl"), run.path, new_tokens=["<call>"], **settings)
        adapted_run(job)
    return run


def said(run: RunDir, way: Residence) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of a batch, and greedy answers with a cache."""
    model, tokenizer = load_run(run, torch.bfloat16, way)
    return logits(model), complete(model, tokenizer, PROMPTS, max_new_tokens=12)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 250, (4, 48), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits.float().cpu()
    return found


@pytest.mark.gpu2
@pytest.mark.distinct
@pytest.mark.parametrize(("bits", "tied"), KINDS)
def test_two_gpus_say_what_one_says(folder: Path, bits: int, tied: bool) -> None:
    run = adapted(folder, bits, tied=tied)
    (wanted, answers), (found, others) = said(run, ONE), said(run, TWO)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert others == answers


@pytest.mark.gpu2
@pytest.mark.distinct
@pytest.mark.parametrize("way", [Residence(layer_gpu=(1,) * 4), TWO])
def test_a_model_leaves_the_current_gpu_as_it_was(folder: Path, way: Residence) -> None:
    """Liger's rotation, which training left in transformers, launches its kernel on the current GPU."""
    run = adapted(folder, 4, tied=False)
    for current in (0, 1):
        torch.cuda.set_device(current)
        torch.testing.assert_close(said(run, way)[0], said(run, ONE)[0], rtol=1e-3, atol=1e-3)
        assert torch.cuda.current_device() == current
    torch.cuda.set_device(0)


@pytest.mark.gpu2
@pytest.mark.distinct
@pytest.mark.parametrize(("bits", "tied"), KINDS)
def test_two_gpus_with_layers_in_host_memory_say_what_one_says(folder: Path, bits: int, tied: bool) -> None:
    run = adapted(folder, bits, tied=tied)
    torch.testing.assert_close(said(run, BOTH)[0], said(run, ONE)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "tied"), KINDS)
def test_layers_in_host_memory_say_what_they_say_on_the_gpu(folder: Path, bits: int, tied: bool) -> None:
    """More than a few tokens, so that both ways unpack before they multiply."""
    run = adapted(folder, bits, tied=tied)
    torch.testing.assert_close(said(run, WAITING)[0], said(run, ONE)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_waits_is_pinned_and_its_adapter_is_on_the_gpu(folder: Path, bits: int) -> None:
    run = adapted(folder, bits, tied=False)
    model, tokenizer = load_run(run, torch.bfloat16, WAITING)
    waiting = decoder_layers(model.get_base_model())[1]
    linears = [module for module in waiting.modules() if is_offloaded(module)]
    assert len(linears) == 7
    assert all(linear.weight.is_pinned() for linear in linears)
    matrices = [value for name, value in waiting.named_parameters() if "lora_" in name]
    assert matrices
    assert all(value.device == torch.device("cuda", 0) for value in matrices)
    assert all(complete(model, tokenizer, PROMPTS, max_new_tokens=12))


def capped(run: RunDir, *, whole: bool) -> tuple[Footprint, int]:
    """What a run takes, and a memory cap just above it, or half a layer below."""
    plan = run.plan()
    parts = footprint(
        plan.facts, bits=16, double_quant=True, compute_bytes=2, tokens=2048, rank_r=plan.spec.lora.r,
        targets=plan.spec.lora.targets,
    )  # fmt: skip
    needed = parts.everywhere + parts.first + parts.last + sum(parts.layers)
    return parts, int((needed if whole else needed - parts.layers[0] // 2) / USABLE_SHARE) + 1024


@pytest.mark.gpu
def test_what_does_not_fit_one_gpu_waits_and_the_cap_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a machine with one card."""
    monkeypatch.setattr(places, "free_bytes", lambda: (80 * GIB,))
    run = adapted(folder, 16, tied=False)
    assert open_model(run.path, max_memory_bytes=capped(run, whole=True)[1]).where == "backbone on GPU 0"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    cap = capped(run, whole=False)[1]
    opened = open_model(run.path, max_memory_bytes=cap)
    assert "of 4 layers are offloaded to host memory" in opened.where
    complete(opened.model, opened.tokenizer, PROMPTS, max_new_tokens=12)
    assert torch.cuda.max_memory_allocated(0) - before + CUDA_CONTEXT_BYTES < cap
    with pytest.raises(PlanError, match="even with all 4 layers in host memory"):
        open_model(run.path, max_memory_bytes=CUDA_CONTEXT_BYTES)


@pytest.mark.gpu2
@pytest.mark.distinct
def test_what_does_not_fit_one_gpu_lies_on_two(folder: Path) -> None:
    run = adapted(folder, 16, tied=False)
    opened = open_model(run.path, max_memory_bytes=capped(run, whole=False)[1])
    assert opened.where == "layers 0-1 on GPU 0, 2-3 on GPU 1"
    torch.testing.assert_close(logits(opened.model), said(run, ONE)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_driver_and_torch_agree_on_what_is_free(folder: Path) -> None:
    torch.zeros(1, device="cuda:0")
    free, total = torch.cuda.mem_get_info(0)
    cached = torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0)
    assert abs(places.free_bytes()[0] - free - cached) < 0.02 * total


@pytest.mark.gpu2
@pytest.mark.distinct
def test_a_plain_model_that_does_not_fit_one_gpu_lies_on_two(folder: Path) -> None:
    source = save_model(folder / "plain", **WIDE)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    cap = int((CUDA_CONTEXT_BYTES + _WORK_BYTES + 0.75 * size) / USABLE_SHARE)
    two, one = (
        open_plain(str(source), "auto", None, cap, tokens=2048),
        open_plain(str(source), "auto", None, None, tokens=2048),
    )
    assert "on GPU 1" in two.where
    assert one.where == "backbone on GPU 0"
    torch.testing.assert_close(logits(two.model), logits(one.model), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
def test_a_merge_is_evaluated_on_the_gpu(folder: Path, tmp_path: Path, bits: int) -> None:
    run = adapted(folder, bits, tied=False)
    losses = merge(run, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert losses.dequantized == pytest.approx(losses.adapter, rel=0.05)
    assert losses.original is not None
    model, _ = load(tmp_path / "merged")
    assert model.device.type == "cuda"
