"""Every way out of a run says what the run said, to what its form rounds, and refuses what it cannot hold."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qdist.core.errors import DataError, ModelError, RunError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.requests import Export
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import qalora_as_lora, qalora_integer_zeros, requantize
from qdist.runtime.exports.gguf import export
from qdist.runtime.exports.qalora_merge import merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.load import load
from qdist.runtime.kernels.gptq_bits import unpack_zeros
from tests.runtime.exports.test_qalora_merge import ASYMMETRIC, SYMMETRIC, relative, run_over
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_config, save_data, save_model


def exported(run: RunDir | tuple[RunDir, ...], out: Path, **options: Any) -> Export:
    runs = (run,) if isinstance(run, RunDir) else run
    return Export(**{"to": "lora", "runs": tuple(str(one.path) for one in runs), "out": str(out), **options})


def qlora_run(folder: Path, **settings: Any) -> RunDir:
    model = save_model(folder / "model", tokenizer=padded())
    return adapted_run(real_job(model, save_data(folder / "d.jsonl"), folder / "run", seq_len=64, **settings))[0]


@pytest.mark.parametrize("pool", ["peft", "mean", "sum"])
def test_a_widened_adapter_is_lora_and_says_the_same(tmp_path: Path, pool: str) -> None:
    """Loaded by PEFT with its own LoRA layers, over the same packed weights."""
    model = save_gptq(tmp_path / "gptq", ASYMMETRIC)
    run = run_over(model, tmp_path / "run", new_tokens=["<call>"], **{"lora.pool": pool})
    qalora_as_lora.run(exported(run, tmp_path / "lora"))
    from tests.runtime.tiny import backbone_of

    plain = PeftModel.from_pretrained(backbone_of(run.plan()), tmp_path / "lora").eval()
    assert not plain.peft_config["default"].use_qalora
    high = run.plan().source.new_token_ids[-1] + 1
    wanted = logits_of(load(run.path)[0], high=high)
    assert float((logits_of(plain, high=high) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    shapes = {tuple(value.shape) for name, value in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()}
    assert (4, 64) in shapes
    assert (4, 128) in shapes


def test_several_adapters_become_one_of_their_ranks_together(tmp_path: Path) -> None:
    model = save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded())
    wide = {"lora.r": 8, "lora.targets": ("q_proj", "up_proj")}
    runs = (
        run_over(model, tmp_path / "a"),
        run_over(model, tmp_path / "b", method="gptq-lora", seed=1, **wide),
    )
    job = exported(runs, tmp_path / "lora", weights=(0.5, -2.0))
    qalora_as_lora.run(job)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path in Adapters.named_in(job).paths:
        update = Adapters.named_in(job).of(path)
        assert update is not None
        down, up = (stored[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        assert down.shape[0] == up.shape[1] == 12
        assert torch.allclose(up @ down, update.dense(), rtol=1e-5, atol=1e-7)


def test_an_adapter_over_a_merged_checkpoint_is_of_no_use_elsewhere(tmp_path: Path) -> None:
    first = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded()), tmp_path / "run")
    merge_offsets(Adapters([first]), tmp_path / "merged")
    second = run_over(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(RunError, match="no other program opens it"):
        qalora_as_lora.run(exported(second, tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def test_plain_lora_needs_no_widening(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has plain LoRA already"):
        qalora_as_lora.run(exported(qlora_run(tmp_path), tmp_path / "lora"))


@pytest.mark.parametrize(
    "gptq", [SYMMETRIC, ASYMMETRIC, Gptq(shape=Shape(2, 32)), Gptq(shape=Shape(3, 64), format="gptq_v2")], ids=str
)
def test_q4_1_holds_the_integers_of_qa_lora(tmp_path: Path, gptq: Gptq, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back by transformers: away from the adapter by no more than fp16 minimums are."""
    model = save_gptq(tmp_path / "gptq", gptq, tokenizer=padded())
    run = run_over(model, tmp_path / "run", bits=gptq.shape.bits)
    export.run(exported(run, tmp_path / "model.gguf", to="gguf"))
    said = capsys.readouterr().out
    assert "14 Q4_1" in said
    assert re.search(r"minimums in float16 take \d+\.\d% of the adapter", said)
    adapter, base = (logits_of(load(of, dtype="float32")[0], high=250) for of in (run.path, model))
    own = logits_of(of_gguf(tmp_path / "model.gguf"), high=250)
    assert relative(own, adapter) < 6e-3
    assert relative(base, adapter) > 0.05


def of_gguf(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_q4_1_after_two_merges_holds_both(tmp_path: Path) -> None:
    first = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded()), tmp_path / "run")
    merge_offsets(Adapters([first]), tmp_path / "merged")
    second = run_over(tmp_path / "merged", tmp_path / "again")
    export.run(exported(second, tmp_path / "model.gguf", to="gguf"))
    own = logits_of(of_gguf(tmp_path / "model.gguf"), high=250)
    assert relative(own, logits_of(load(second.path)[0], high=250)) < 6e-3


@pytest.mark.parametrize(("kind", "rounding"), [("f16", 6e-3), ("q8_0", 6e-2)])
@pytest.mark.parametrize("method", ["qlora", "qa-lora", "gptq-lora"])
def test_any_method_is_rounded_to_f16_and_q8_0(tmp_path: Path, kind: Any, rounding: float, method: str) -> None:
    if method == "qlora":
        run = qlora_run(tmp_path)
    else:
        run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded()), tmp_path / "run", method=method)
    export.run(exported(run, tmp_path / "model.gguf", type=kind, to="gguf"))
    own = logits_of(of_gguf(tmp_path / "model.gguf"), high=250)
    assert relative(own, logits_of(load(run.path)[0], high=250)) < rounding


@pytest.mark.parametrize("method", ["qlora", "gptq-lora", "8 bits"])
def test_q4_1_is_refused_where_it_would_round_again(tmp_path: Path, method: str) -> None:
    said = {"qlora": "no integer weights", "gptq-lora": "plain LoRA", "8 bits": "up to 8 bits"}[method]
    if method == "qlora":
        run = qlora_run(tmp_path)
    else:
        eight = method == "8 bits"
        model = save_gptq(tmp_path / "gptq", Gptq(shape=Shape(8, 32)) if eight else SYMMETRIC)
        settings = {"method": "qa-lora", "bits": 8} if eight else {"method": "gptq-lora"}
        run = run_over(model, tmp_path / "run", **settings)
    with pytest.raises(RunError, match=said) as caught:
        export.run(exported(run, tmp_path / "model.gguf", type="q4_1", to="gguf"))
    assert "--type q8_0" in str(caught.value.try_)
    assert not (tmp_path / "model.gguf").exists()


def test_a_family_that_gguf_readers_have_no_name_for_is_refused(tmp_path: Path) -> None:
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC, "opt"), tmp_path / "run")
    with pytest.raises(ModelError, match="opt"):
        export.run(exported(run, tmp_path / "model.gguf", to="gguf"))
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("gptq", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_integer_zeros_lose_what_is_said(tmp_path: Path, gptq: Gptq, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_gptq(tmp_path / "gptq", gptq, tokenizer=padded())
    run = run_over(model, tmp_path / "run", scale=0.3)
    with pytest.raises(RunError, match=r"would lose \d+\.\d% of the adapter") as caught:
        qalora_integer_zeros.run(exported(run, tmp_path / "zeros", to="zeros"))
    assert "qdist merge" in str(caught.value.try_)
    assert not (tmp_path / "zeros").exists()
    qalora_integer_zeros.run(exported(run, tmp_path / "zeros", lossy=True, to="zeros"))
    lost = qalora_integer_zeros.loss_of_zeros(Adapters([run]))
    assert f"{lost.relative:.1%} of the adapter is lost" in capsys.readouterr().out
    assert 0.01 < lost.relative < 1
    assert lost.relative == pytest.approx(missing(model, tmp_path / "zeros", gptq, Adapters([run])), rel=1e-4)


def missing(base: Path, out: Path, gptq: Gptq, adapters: Adapters) -> float:
    """Norm of what the written zeros do not add by norm of the update, over all weights."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    off = total = 0.0
    for path in adapters.paths:
        assert torch.equal(before[f"{path}.qweight"], after[f"{path}.qweight"])
        old = unpack_zeros(before[f"{path}.qzeros"], 4, gptq.zero_offset).float()
        new = unpack_zeros(after[f"{path}.qzeros"], 4, 0).float()
        update = adapters.of(path).pooled(32)  # type: ignore[union-attr]
        off += float(((old - new) * before[f"{path}.scales"].float() - update).square().sum())
        total += float(update.square().sum())
    return (off / total) ** 0.5


def test_small_updates_are_lost_in_integer_zeros_altogether(tmp_path: Path) -> None:
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded()), tmp_path / "run", scale=2e-4)
    assert qalora_integer_zeros.loss_of_zeros(Adapters([run])).relative == 1.0


@pytest.mark.parametrize("method", ["qlora", "gptq-lora"])
def test_merged_and_quantized_again(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    if method == "qlora":
        run = qlora_run(tmp_path, bits=8, train__held_out=0.2)
        shape = Shape(4, 128)
    else:
        model = save_gptq(tmp_path / "gptq", ASYMMETRIC, tokenizer=padded())
        run, shape = run_over(model, tmp_path / "run", method=method, train__held_out=0.2), ASYMMETRIC.shape
    requantize.run(exported(run, tmp_path / "out", samples=4, to="gptq"))
    said = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.split()[-1].replace(".", "").isdigit()]
    assert len(losses) == 3
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] == pytest.approx(losses[0], rel=0.2)
    from qdist.host.sources.model_folder import stated

    gptq = stated(tmp_path / "out")
    assert gptq is not None
    assert gptq.shape == shape
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_was_left_of_another_export_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """A 16-bit model of another run lies where an export to the same name was killed."""
    run = qlora_run(tmp_path)
    stale = [tmp_path / name for name in (".out.16bit-0123456789ab", "..out.16bit-0123456789ab.unfinished")]
    for folder in stale:
        folder.mkdir()
    requantize.run(exported(run, tmp_path / "out", samples=2, to="gptq"))
    assert not any(folder.exists() for folder in stale)
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_sixteen_bit_model_is_gone_before_the_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a kill in between would leave it for good: the next command is refused, for the checkpoint exists."""
    run, remove = qlora_run(tmp_path), shutil.rmtree

    def killed(path: Path, **more: Any) -> None:
        if path.name == ".out.16bit-spent":
            raise KeyboardInterrupt
        remove(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr("qdist.runtime.exports.requantize.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            requantize.run(exported(run, tmp_path / "out", samples=2, to="gptq"))
    assert not (tmp_path / "out").exists()
    requantize.run(exported(run, tmp_path / "out", samples=2, to="gptq"))
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_too_little_calibration_data_is_said_before_anything_is_written(tmp_path: Path) -> None:
    run = qlora_run(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError):
        requantize.run(exported(run, tmp_path / "out", samples=100_000, to="gptq"))
    assert sorted(tmp_path.iterdir()) == before


def test_integer_zeros_need_a_gptq_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a GPTQ checkpoint"):
        qalora_integer_zeros.run(exported(qlora_run(tmp_path), tmp_path / "zeros", lossy=True, to="zeros"))


def test_random_weights_are_not_quantized_again(tmp_path: Path) -> None:
    run, _ = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run"))
    with pytest.raises(RunError, match="no data to calibrate on"):
        requantize.run(exported(run, tmp_path / "out", to="gptq"))
