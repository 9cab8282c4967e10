"""`qdist.load` opens runs and models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

import qdist
from qdist.core.errors import ModelError, QdistError, RunError
from qdist.host.run.rundir import PLAN, RunDir
from qdist.runtime.exports.backbone import Backbone
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_config, save_data, save_model, written


def test_a_run_comes_with_its_adapter_and_repaired_tokenizer(tmp_path: Path) -> None:
    job = real_job(save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl"), tmp_path / "run", seq_len=64)
    run, trained = adapted_run(job)
    model, tokenizer = qdist.load(run.path)
    assert torch.equal(logits_of(model, high=250), logits_of(trained, high=250))
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.pad_token_id is not None
    assert run.plan().source.vocab_rows is None
    assert model.config.use_cache
    assert not model.training


def test_a_folder_comes_as_it_is_stored(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model, tokenizer = qdist.load(str(folder))
    assert model.dtype == torch.float32
    assert tokenizer("hello")["input_ids"]
    assert tokenizer.pad_token_id == model.config.pad_token_id


def test_a_run_of_random_weights_has_no_tokenizer(tmp_path: Path) -> None:
    run, trained = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run", train__held_out=0.0))
    model, tokenizer = qdist.load(run.path)
    assert tokenizer is None
    assert torch.equal(logits_of(model), logits_of(trained))


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert qdist.load(folder)[1] is None


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_given(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "model")
    run, _ = adapted_run(dummy_job(save_config(tmp_path / "bare"), tmp_path / "run", train__held_out=0.0))
    assert qdist.load(folder, dtype=name)[0].dtype == getattr(torch, name)
    model, _ = qdist.load(run.path, dtype=name)
    base = model.get_base_model()
    assert base.get_input_embeddings().weight.dtype == getattr(torch, name)
    assert base.model.layers[0].self_attn.q_proj.base_layer.compute_dtype == getattr(torch, name)
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_what_cannot_be_opened_says_what_to_try(tmp_path: Path) -> None:
    unfinished = written(dummy_job(save_config(tmp_path / "model"), tmp_path / "run"))
    for target, options, said in (
        (unfinished.path, {}, "has no adapter yet"),
        (tmp_path / "nothing", {}, "no folder"),
        (tmp_path, {}, "no config.json"),
        (unfinished.path, {"dtype": "int8"}, "dtype cannot be 'int8'"),
        (save_model(tmp_path / "whole"), {"max_memory": "20GiB"}, "max_memory is of GPUs"),
        (tmp_path / "whole", {"max_memory": "20 apples"}, "not an amount of memory"),
    ):
        with pytest.raises(QdistError, match=said) as caught:
            qdist.load(target, **options)
        assert caught.value.try_


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_that_are_gone_are_packed_again(
    tmp_path: Path, bits: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """An emptied cache, and a run from before there was one."""
    source, data = save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl")
    run, trained = adapted_run(real_job(source, data, tmp_path / "run", seq_len=64, bits=bits))
    packed = Path(run.plan().source.packed)
    wanted = logits_of(trained, high=250)
    for change in (lambda: shutil.rmtree(packed), lambda: _forget_packed(run)):
        change()
        assert torch.equal(logits_of(qdist.load(run.path)[0], high=250), wanted)
    assert packed.is_dir()
    assert "have changed" not in capfd.readouterr().err


def _forget_packed(run: RunDir) -> None:
    old = json.loads((run.path / PLAN).read_text())
    del old["source"]["packed"]
    (run.path / PLAN).write_text(json.dumps(old))


def test_a_model_that_changed_since_or_went_with_its_packed_form_is_named(tmp_path: Path) -> None:
    source, data = save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl")
    run, _ = adapted_run(real_job(source, data, tmp_path / "run", seq_len=64))
    save_model(source, seed=1)
    assert qdist.load(run.path), "the packed form is still there"
    with pytest.raises(RunError, match=f"{source} is not the model that the run was trained on"):
        Backbone(run.plan(), onto="original")
    shutil.rmtree(run.plan().source.packed)
    with pytest.raises(RunError, match=f"{source} is not the model that the run was trained on"):
        qdist.load(run.path)
    shutil.rmtree(source)
    with pytest.raises(ModelError, match=r"model, which the run was trained on, is gone, and so is what was packed"):
        qdist.load(run.path)


def test_a_run_is_packed_again_from_the_same_model_and_uses_what_is_packed_without_it(tmp_path: Path) -> None:
    source, data = save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl")
    run, trained = adapted_run(real_job(source, data, tmp_path / "run", seq_len=64))
    shutil.rmtree(run.plan().source.packed)
    model, _ = qdist.load(run.path)
    assert torch.equal(logits_of(model, high=250), logits_of(trained, high=250))
    shutil.rmtree(source)
    model, _ = qdist.load(run.path)
    assert torch.equal(logits_of(model, high=250), logits_of(trained, high=250))


def test_a_model_that_went_with_the_cache_is_made_again_from_what_the_run_was_given(tmp_path: Path) -> None:
    source, data = save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl")
    run, trained = adapted_run(real_job(source, data, tmp_path / "run", seq_len=64))
    plan = run.plan()
    shutil.rmtree(plan.source.packed)
    lost = msgspec.structs.replace(plan.source, path=str(tmp_path / "cache" / "models" / "converted"))
    (run.path / PLAN).write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, source=lost)))
    model, _ = qdist.load(run.path)
    assert torch.equal(logits_of(model, high=250), logits_of(trained, high=250))


def test_importing_qdist_loads_no_torch() -> None:
    code = "import qdist, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
