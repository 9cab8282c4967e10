"""Runs written as a 16-bit model: the same after a kill, a matrix at a time, several runs added up, or nothing."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdist.core.errors import ModelError, PlanError, RunError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.requests import Export, Merge
from qdist.host.machine import probe
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime import tasks
from qdist.runtime.exports import merge as merging
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats import packed_folder, work_folder
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.infer.load import load
from qdist.runtime.train.checkpoint import load_tensors
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.gptq_files import save_gptq
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_config, save_data, save_model

BF16 = 2.0**-8
ROOT = Path(__file__).parents[3]


def run_over(folder: Path, source: Path, *, scale: float = 0.05, **settings: Any) -> RunDir:
    data = save_data(folder.with_name("d.jsonl"))
    return adapted_run(real_job(source, data, folder, seq_len=64, **settings), scale=scale)[0]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return run_over(tmp_path / "run", save_model(tmp_path / "model"))


def padded() -> Any:
    """A tokenizer that needs no row of its own for padding."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def write(run: RunDir, out: Path, *, onto: Any = "dequantized", dtype: torch.dtype = torch.bfloat16) -> None:
    merged_16bit.write(Adapters([run]), out, onto=onto, dtype=dtype)


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, file in tensor_files(folder).items():
        with opened(folder / file) as handle:
            tensors[name] = handle.get_tensor(name)
    return tensors


class Killed(BaseException):
    pass


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_killed_at_a_layer_and_resumed_it_is_the_same_to_the_byte(
    run: RunDir, tmp_path: Path, onto: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, tmp_path / "expected", onto=onto)
    written: list[str] = []
    real = packed_folder.write_tensors

    def killed_at_the_second(folder: Path, name: str, entries: Any, **more: Any) -> Any:
        if written:
            (folder / f".{name}.unfinished").write_bytes(b"half a file")
            raise Killed
        written.append(name)
        return real(folder, name, entries, **more)

    def noted(folder: Path, name: str, entries: Any, **more: Any) -> Any:
        written.append(name)
        return real(folder, name, entries, **more)

    with monkeypatch.context() as patch:
        patch.setattr(packed_folder, "write_tensors", killed_at_the_second)
        with pytest.raises(Killed):
            write(run, tmp_path / "out", onto=onto)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(packed_folder, "write_tensors", noted)
    write(run, tmp_path / "out", onto=onto)
    assert written == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert "1 of 3 files are there already" in capsys.readouterr().err
    ours, expected = tmp_path / "out", tmp_path / "expected"
    files = sorted(path.name for path in expected.iterdir())
    assert files == sorted(path.name for path in ours.iterdir())
    assert [name for name in files if (ours / name).read_bytes() != (expected / name).read_bytes()] == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", ["adapter", "weights", "dtype", "onto"])
def test_what_was_begun_of_something_else_is_not_used(
    run: RunDir, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first file is marked; the mark must be gone."""
    with monkeypatch.context() as patch:
        patch.setattr(merged_16bit, "write_index", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(run, tmp_path / "out")
    marked = tmp_path / ".out.unfinished" / "marked"
    marked.write_text("")
    if change == "adapter":
        tensors = load_file(run.adapter / ADAPTER)
        save_file({name: 2 * value for name, value in tensors.items()}, run.adapter / ADAPTER)
    merged_16bit.write(
        Adapters([run], (0.5,) if change == "weights" else ()),
        tmp_path / "out",
        onto="original" if change == "onto" else "dequantized",
        dtype=torch.float16 if change == "dtype" else torch.bfloat16,
    )
    assert not (tmp_path / "out" / "marked").exists()


def test_updates_of_several_runs_are_added_with_their_weights(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tokenizer=padded())
    runs = [run_over(tmp_path / name, source, scale=scale) for name, scale in (("a", 0.05), ("b", 0.1))]
    weights = (0.7, -0.3)
    merged_16bit.write(Adapters(runs, weights), tmp_path / "out", onto="dequantized", dtype=torch.bfloat16)
    merged, models = tensors_of(tmp_path / "out"), [load(run.path)[0].get_base_model() for run in runs]
    paths = [name for name, module in models[0].named_modules() if hasattr(module, "lora_A")]
    assert len(paths) == 14
    for path in paths:
        layers = [model.get_submodule(path) for model in models]
        deltas = [w * layer.get_delta_weight("default") for w, layer in zip(weights, layers, strict=True)]
        assert not torch.equal(*deltas)
        base = layers[0].base_layer.matrix(torch.float32, torch.device("cpu"))
        expected = base + sum(deltas)
        error = (merged[f"{path}.weight"].float() - expected).abs()
        assert bool((error <= BF16 * expected.abs() + 1e-7).all()), path


def test_random_weights_are_those_that_were_trained_on(tmp_path: Path) -> None:
    job = dummy_job(save_config(tmp_path / "model"), tmp_path / "run", train__held_out=0.0)
    run, trained = adapted_run(job)
    write(run, tmp_path / "out")
    ours, expected = logits_of(plain(tmp_path / "out")), logits_of(trained)
    assert float((ours - expected).norm() / expected.norm()) < 4 * BF16


@pytest.mark.parametrize("gptq", [Gptq(shape=Shape(4, 32)), Gptq(shape=Shape(3, 32), desc_act=True, sym=False)])
def test_a_gptq_run_says_what_its_adapter_says(tmp_path: Path, gptq: Gptq) -> None:
    source = save_gptq(tmp_path / "model", gptq)
    run = run_over(tmp_path / "run", source, method="gptq-lora", bits=gptq.shape.bits)
    write(run, tmp_path / "out")
    ours, expected = logits_of(plain(tmp_path / "out"), high=250), logits_of(load(run.path)[0], high=250)
    assert float((ours - expected).norm() / expected.norm()) < 4 * BF16
    with pytest.raises(RunError, match=r"GPTQ checkpoint.*\n  try: --onto dequantized"):
        write(run, tmp_path / "original", onto="original")


def test_what_float16_does_not_hold_is_named_and_nothing_is_left(run: RunDir, tmp_path: Path) -> None:
    tensors = load_tensors(run.adapter / ADAPTER)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3] *= 1e8
    save_file(tensors, run.adapter / ADAPTER, metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    said = (
        r"^model\.layers\.1\.mlp\.up_proj\.weight reaches .*e\+0. once merged; float16 ends at 65,504\n  try: --dtype b"
    )
    with pytest.raises(ModelError, match=said):
        write(run, tmp_path / "out", dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before
    write(run, tmp_path / "out", dtype=torch.bfloat16)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(PlanError, match=r"writing out needs 32.\d MiB in .*, which has 1.0 MiB free"):
        write(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_losses_are_told_or_why_there_are_none(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "host_memory", lambda _: (1 << 20, 1 << 17))
    merging.run(Merge(runs=(str(run.path),), out=str(tmp_path / "out")))
    first, folded, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: 1 adapter merged onto the dequantized backbone, bfloat16, ")
    assert folded == "folded 14 of 14 linears"
    assert [line[:41] for line in lines] == [
        "held-out loss  adapter                   ",
        "               merged onto dequantized   ",
        "               merged onto original      ",
    ]
    assert "not evaluated: it takes " in lines[1]
    assert lines[1].endswith("KiB of host memory, 128 KiB is free")
    assert logits_of(plain(tmp_path / "out"), high=250).isfinite().all()


def test_one_command_writes_several_runs_and_evaluates_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model(tmp_path / "model", tokenizer=padded())
    runs = tuple(str(run_over(tmp_path / name, source).path) for name in ("a", "b"))
    merging.run(Merge(runs=runs, out=str(tmp_path / "merged"), weights=(0.5, -1e-3)))
    assert capsys.readouterr().out.endswith(
        "held-out loss  not evaluated: several runs, each with held-out samples of its own\n"
    )
    again = Export(to="16bit", runs=runs, out=str(tmp_path / "merged"), weights=(0.5, -1e-3))
    with pytest.raises(RunError, match="merged exists\n  try: another --out"):
        tasks.perform(again)


MEASURE = """
import sys
from pathlib import Path
import torch
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.update import Adapters

def memory(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

def write(run, out):
    merged_16bit.write(Adapters([RunDir(run)]), Path(out), onto=sys.argv[1], dtype=torch.bfloat16)

def peak(run, out):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    write(run, sys.argv[4] + "/" + out)
    return memory("VmHWM")

print(-peak(sys.argv[2], "2") + peak(sys.argv[3], "12"))
"""


@pytest.fixture(scope="module")
def shallow_and_deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs over 2 and over 12 layers of the same width."""
    folder = tmp_path_factory.mktemp("depths")
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    shallow = run_over(folder / "shallow", save_model(folder / "model2", num_hidden_layers=2, **shape))
    deep = run_over(folder / "deep", save_model(folder / "model12", num_hidden_layers=12, **shape))
    return shallow.path, deep.path


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, shallow_and_deep: tuple[Path, Path], onto: str) -> None:
    """Ten more layers are 257 MB more in 16 bits, and 4 MB more at the peak.

    glibc raises its threshold for buffers of their own as they are freed, so that some later ones leave holes: runs of
    one depth differed by up to 110 MB. Given by the environment, the threshold stays.
    """
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, onto, *map(str, shallow_and_deep), str(tmp_path)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )  # fmt: skip
    grown = int(child.stdout)
    print(f"grew by {grown / 2**20:.1f} MiB")
    sizes = [sum(file.stat().st_size for file in (tmp_path / out).glob("*.safetensors")) for out in ("2", "12")]
    assert sizes[1] - sizes[0] > 250e6
    assert grown < 20e6
