"""A merged model is plain transformers and says what the adapter said."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import JobError, RunError
from qdist.core.model.storage import Packing
from qdist.host.run.rundir import RunDir
from qdist.runtime.formats import work_folder
from qdist.runtime.formats.packed_folder import MANIFEST
from qdist.runtime.infer.load import load
from qdist.runtime.quantize.bitsandbytes import quantize
from tests.runtime.merging import merge
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_config, save_data, save_model

BF16 = 2.0**-8
"""Largest relative error of rounding to bfloat16: 8 bits of significand, the first one implied."""


def run_over(folder: Path, family: str = "llama", model: dict[str, Any] | None = None, **settings: Any) -> RunDir:
    source = save_model(folder / "model", family, **(model or {}))
    data = save_data(folder / "d.jsonl")
    return adapted_run(real_job(source, data, folder / "run", seq_len=64, **settings))[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run over `model` beside it. Tests leave both as they are."""
    return run_over(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def dequantized(whole: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run merged in bfloat16."""
    merge(whole, out := tmp_path_factory.mktemp("merged") / "dequantized", onto="dequantized", dtype=torch.bfloat16)
    return out


def plain(folder: Path) -> Any:
    """What transformers makes of a folder, told nothing but where it is and to compute in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("bits", "family"),
    [
        (4, "llama"), (4, "bloom"), (4, "gpt_neox"), (4, "opt"), (4, "qwen2"), (8, "llama"), (8, "bloom"), (16, "opt"),
        (16, "qwen2"), (4, "olmo2"), (8, "olmo2"), (16, "olmo2"),
    ],
)  # fmt: skip
def test_a_merged_model_says_what_the_adapter_says(tmp_path: Path, family: str, bits: int) -> None:
    """Logits within four times bfloat16's rounding, int8's within sixteen: it rounds activations too."""
    run = run_over(tmp_path, family, bits=bits)
    losses = merge(run, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    adapter = logits_of(load(run.path)[0], high=250)
    error = relative(logits_of(plain(tmp_path / "merged"), high=250), adapter)
    assert error < (16 if bits == 8 else 4) * BF16
    assert losses.dequantized == pytest.approx(losses.adapter, rel=0.02)


def test_every_merged_weight_is_the_float32_sum_rounded_once(whole: RunDir, dequantized: Path) -> None:
    merged = dict(plain(dequantized).named_parameters())
    for name, (base, delta) in linears(load(whole.path)[0]).items():
        assert torch.equal(merged[f"{name}.weight"], (base + delta).bfloat16().float()), name


def linears(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Dequantized weight and alpha / r * B A of each adapted linear."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            packed = module.base_layer
            base = packed.matrix(packed.compute_dtype, torch.device("cpu")).float()
            found[name] = (base, module.get_delta_weight("default").detach())
    assert len(found) == 14
    return found


def test_onto_the_original_is_the_original_and_the_delta_exactly(
    whole: RunDir, dequantized: Path, tmp_path: Path
) -> None:
    merge(whole, tmp_path / "original", onto="original", dtype=torch.bfloat16)
    folders = (tmp_path / "original", dequantized, whole.path.with_name("model"))
    merged, other, original = (dict(plain(folder).named_parameters()) for folder in folders)
    deltas, fresh = linears(load(whole.path)[0]), whole.plan().source.new_token_ids
    for name, weight in original.items():
        linear = name.removesuffix(".weight")
        if linear in deltas:
            assert torch.equal(merged[name], (weight + deltas[linear][1]).bfloat16().float()), name
            assert not torch.equal(merged[name], other[name]), name
        else:
            old = [row for row in range(len(weight)) if row not in fresh]
            assert torch.equal(merged[name][old], weight[old].bfloat16().float()), name
            assert torch.equal(merged[name], other[name]), name


@pytest.mark.parametrize(
    ("family", "tied", "onto"),
    [
        ("llama", True, "dequantized"), ("llama", False, "original"), ("bloom", True, "original"),
        ("bloom", False, "dequantized"), ("gpt_neox", True, "dequantized"), ("gpt_neox", False, "original"),
    ],
)  # fmt: skip
def test_rows_of_new_tokens_are_merged_too(tmp_path: Path, family: str, tied: bool, onto: str) -> None:
    """At 16 bits both backbones are the same one."""
    shape = {"tie_word_embeddings": tied, "vocab_size": 270}
    run = run_over(tmp_path, family, shape, bits=16, new_tokens=["<call>", "<return>"])
    merge(run, tmp_path / "merged", onto=onto, dtype=torch.bfloat16)
    merged = plain(tmp_path / "merged")
    rows = run.plan().source.vocab_rows or 0
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == rows > 270
    high = run.plan().source.new_token_ids[-1] + 1
    assert relative(logits_of(merged, high=high), logits_of(load(run.path)[0], high=high)) < 4 * BF16


def test_float16_is_written_where_it_is_asked_for(whole: RunDir, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    merge(whole, tmp_path / "merged", onto="dequantized", dtype=torch.float16)
    tensors = [tensor for file in (tmp_path / "merged").glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}


def test_a_merged_model_keeps_no_trace_of_quantization_and_brings_its_tokenizer(dequantized: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(dequantized)
    tokenizer = AutoTokenizer.from_pretrained(dequantized)
    assert not hasattr(config, "quantization_config")
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    assert config.use_cache


def test_random_weights_are_merged_and_have_no_original(tmp_path: Path) -> None:
    job = dummy_job(save_config(tmp_path / "model"), tmp_path / "run", train__held_out=0.0)
    run, _ = adapted_run(job)
    with pytest.raises(RunError, match="no original"):
        merge(run, tmp_path / "merged", onto="original", dtype=torch.bfloat16)
    assert not (tmp_path / "merged").exists()
    losses = merge(run, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert (losses.adapter, losses.dequantized, losses.original) == (None, None, None)
    assert relative(logits_of(plain(tmp_path / "merged")), logits_of(load(run.path)[0])) < 4 * BF16


def packed_run(folder: Path, *, bits: int = 4) -> RunDir:
    """A run over what `qdist quantize` wrote; the original lies in `model`."""
    source, packed = save_model(folder / "model"), folder / "packed"
    quantize(str(source), packed, Packing(bits=4) if bits == 4 else Packing(bits=8))
    data = save_data(folder / "d.jsonl")
    return adapted_run(real_job(packed, data, folder / "run", seq_len=64, bits=bits))[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_over_a_packed_folder_is_merged_onto_what_was_packed(tmp_path: Path, bits: int) -> None:
    run = packed_run(tmp_path, bits=bits)
    losses = merge(run, tmp_path / "merged", onto="original", dtype=torch.bfloat16)
    assert losses.original is not None
    merged, original = (dict(plain(tmp_path / name).named_parameters()) for name in ("merged", "model"))
    for name, (_, delta) in linears(load(run.path)[0]).items():
        weight = original[f"{name}.weight"]
        assert torch.equal(merged[f"{name}.weight"], (weight + delta).bfloat16().float()), name
    merge(run, tmp_path / "dequantized", onto="dequantized", dtype=torch.bfloat16)
    adapter = logits_of(load(run.path)[0], high=250)
    assert relative(logits_of(plain(tmp_path / "dequantized"), high=250), adapter) < (16 if bits == 8 else 4) * BF16


@pytest.mark.parametrize(
    ("change", "said"),
    [("gone", "which is not there any more"), ("other", "have changed since"), ("no manifest", "does not say which")],
)
def test_a_packed_folder_without_its_original_is_merged_dequantized_alone(
    tmp_path: Path, change: str, said: str
) -> None:
    run = packed_run(tmp_path)
    if change == "gone":
        shutil.rmtree(tmp_path / "model")
    elif change == "other":
        save_model(tmp_path / "model", seed=1)
    else:
        (tmp_path / "packed" / MANIFEST).unlink()
    with pytest.raises(RunError, match=said) as caught:
        merge(run, tmp_path / "merged", onto="original", dtype=torch.bfloat16)
    assert caught.value.try_ == "--onto dequantized"
    assert not (tmp_path / "merged").exists()
    losses = merge(run, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert losses.original is None
    assert losses.dequantized == pytest.approx(losses.adapter, rel=0.02)


def test_nothing_half_written_is_there_when_merging_fails(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "flush", full)
        with pytest.raises(JobError, match="no room is left"):
            merge(whole, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == [".merged.unfinished"]
    merge(whole, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
