"""Adapters that leave a run are plain PEFT, and never empty, broken or unmoved."""

import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import qdist
from qdist.core.errors import RunError
from qdist.core.evaluation.course import Outcome
from qdist.core.telemetry.events import Event, encode, write_phases
from qdist.host.files import locked
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.sources.targets import ADAPTER, adapter_step, step_note
from qdist.runtime.engine.torch import Adapter, State
from qdist.runtime.model.skeleton import load_plain
from qdist.runtime.train import checkpoint
from qdist.runtime.train.measure import HeldMemory, Peak
from qdist.runtime.train.result import adapter_checksum, check_adapter, choose_step, gather, gather_named, write_result
from tests.runtime.tiny import (
    VOCAB,
    adapted_run,
    dummy_job,
    logits_of,
    real_job,
    save_config,
    save_data,
    save_model,
    written,
)

GOOD = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "the adapter in HERE has no tensors"),
        ({**GOOD, "a.lora_A.weight": torch.tensor([1.0, torch.nan, torch.inf])}, "2 of 3 values of a.lora_A.weight"),
        ({**GOOD, "a.lora_B.weight": torch.zeros(3, 2)}, "every lora_B in HERE is zero"),
    ],
)
def test_an_adapter_that_cannot_have_learnt_is_refused(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(RunError) as caught:
        check_adapter(tensors, where="HERE")
    assert caught.value.message.startswith(said)


def test_one_lora_b_that_moved_is_enough() -> None:
    check_adapter({**GOOD, "b.lora_B.weight": torch.zeros(3, 2)}, where="HERE")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return written(dummy_job(save_config(tmp_path / "model"), tmp_path / "run"))


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_refused_adapter_leaves_the_folder_as_it_was(run: RunDir, wrong: float) -> None:
    state = State({"m.lora_B.default.weight": torch.full((2, 2), wrong)}, {}, 1)
    checkpoint.save(run, checkpoint.Progress(step=1, samples=4), state, keep=1)
    run.adapter.mkdir()
    (run.adapter / "older").touch()
    with pytest.raises(RunError):
        gather(run, step=1)
    assert [file.name for file in run.adapter.iterdir()] == ["older"]
    assert not list(run.path.glob(".adapter*"))


def test_a_second_gather_replaces_the_first(run: RunDir) -> None:
    for step in (1, 2):
        state = State({"m.lora_B.default.weight": torch.full((2, 2), float(step))}, {}, step)
        checkpoint.save(run, checkpoint.Progress(step=step, samples=4), state, keep=2)
        gather(run, step=step)
    assert float(checkpoint.load_tensors(run.adapter / "adapter_model.safetensors")["m.lora_B.weight"][0, 0]) == 2.0
    assert not list(run.path.glob(".adapter*"))


@pytest.mark.parametrize(("which", "step"), [("last", 3), ("best", 1), ("1", 1), ("3", 3)])
def test_a_checkpoint_is_chosen_by_word_or_number(run: RunDir, which: str, step: int) -> None:
    for number, held_out in ((1, ((1, 0.5),)), (3, ((1, 0.5), (3, 0.9)))):
        state = State({"m.lora_B.default.weight": torch.ones(2, 2)}, {}, number)
        checkpoint.save(run, checkpoint.Progress(step=number, samples=4, held_out=held_out), state, keep=3)
    assert choose_step(run, which) == step


def saved(run: RunDir, step: int, *, held_out: tuple[tuple[int, float], ...] = ()) -> None:
    state = State({"m.lora_B.default.weight": torch.full((2, 2), float(step))}, {}, step)
    checkpoint.save(run, checkpoint.Progress(step=step, samples=4, held_out=held_out), state, keep=9)


def gathered(folder: Path) -> float:
    return float(checkpoint.load_tensors(folder / ADAPTER)["m.lora_B.weight"][0, 0])


def test_an_adapter_says_of_which_step_it_is_until_the_end_is_gathered(run: RunDir) -> None:
    """Of 4 steps."""
    for step in (1, 3, 4):
        saved(run, step, held_out=((1, 0.5), (3, 0.2), (4, 0.9)))
    notes = []
    for which in ("1", "best", "last"):
        gather_named(run, which)
        notes.append(step_note(run))
    assert notes == ["adapter of step 1 of 4", "adapter of step 3 of 4 (checkpoint best)", ""]
    assert adapter_step(run) == (4, 4)
    gather(run, step=3)
    assert step_note(run) == "adapter of step 3 of 4"


def test_a_checkpoint_is_gathered_elsewhere_and_the_runs_own_adapter_stays(run: RunDir, tmp_path: Path) -> None:
    saved(run, 1)
    saved(run, 4)
    gather(run, step=4)
    for out in (tmp_path / "new/deeper", run.path / "step1"):
        assert gather_named(run, "1", out=out) == (out, 1)
        assert gathered(out) == 1.0
        assert {path.name for path in out.iterdir()} == {path.name for path in run.adapter.iterdir()}
        with pytest.raises(RunError, match="exists"):
            gather_named(run, "1", out=out)
    assert gathered(run.adapter) == 4.0


def test_a_gather_takes_its_turn_with_that_of_the_run_and_then_looks_for_the_last(run: RunDir) -> None:
    """The run ends, and gathers, while a gather of its last checkpoint waits."""
    saved(run, 3)
    waiting = threading.Event()

    def ask() -> None:
        waiting.set()
        gather_named(run, "last")

    asking = threading.Thread(target=ask)
    with locked(run.path / ".gather.lock"):
        asking.start()
        waiting.wait()
        saved(run, 4)
    asking.join()
    assert (gathered(run.adapter), step_note(run)) == (4.0, "")
    assert not list(run.path.glob(".adapter*"))


def test_a_gather_after_the_cache_was_emptied_takes_the_tokenizer_alone_from_the_adapter(tmp_path: Path) -> None:
    job = real_job(save_model(tmp_path / "model"), save_data(tmp_path / "d.jsonl"), tmp_path / "run", seq_len=64)
    run, _ = adapted_run(job)
    before, state = checkpoint.load(run.checkpoint(4))[1], checkpoint.load(run.checkpoint(4))[1]
    state = state._replace(parameters={name: value + 1 for name, value in before.parameters.items()})
    checkpoint.save(run, checkpoint.Progress(step=2, samples=0), state, keep=9)
    plan = msgspec.structs.replace(job.plan, source=msgspec.structs.replace(job.plan.source, tokenizer="gone"))
    (run.path / PLAN).write_bytes(msgspec.json.encode(plan))
    names = {path.name for path in run.adapter.iterdir()}
    old = checkpoint.load_tensors(run.adapter / ADAPTER)
    gather(run, step=2)
    new = checkpoint.load_tensors(run.adapter / ADAPTER)
    assert all(torch.equal(new[name], old[name] + 1) for name in old)
    assert {path.name for path in run.adapter.iterdir()} == names
    gather_named(run, "2", out=tmp_path / "elsewhere")
    shutil.rmtree(run.adapter)
    with pytest.raises(RunError, match="the run's tokenizer is gone"):
        gather(run, step=2)


def test_what_a_killed_gather_left_is_taken_away(run: RunDir) -> None:
    saved(run, 4)
    for name in (".adapter.old", ".adapter.new", ".adapter.123"):
        (run.path / name).mkdir()
        (run.path / name / ADAPTER).touch()
    gather(run, step=4)
    assert not list(run.path.glob(".adapter*"))


def test_loading_a_run_says_when_its_adapter_is_not_the_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run", steps=4))
    qdist.load(run.path)
    assert "adapter of" not in capsys.readouterr().err
    checkpoint.save(run, checkpoint.Progress(step=2, samples=0), checkpoint.load(run.checkpoint(4))[1], keep=9)
    gather(run, step=2)
    qdist.load(run.path)
    assert f"note: {run.path}: adapter of step 2 of 4\n" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["2", "best", "newest"])
def test_a_checkpoint_that_is_not_there_is_refused(run: RunDir, which: str) -> None:
    state = State({"m.lora_B.default.weight": torch.ones(2, 2)}, {}, 1)
    checkpoint.save(run, checkpoint.Progress(step=1, samples=4), state, keep=3)
    with pytest.raises(RunError):
        choose_step(run, which)


def test_a_result_holds_every_ranks_peaks_and_speed_and_start_beside_the_predictions(run: RunDir) -> None:
    state = State({"m.lora_B.default.weight": torch.ones(2, 3)}, {}, 1)
    checkpoint.save(run, checkpoint.Progress(step=1, samples=4), state, keep=1)
    gather(run, step=1)
    planned = (run.path / PLAN).stat().st_mtime
    for rank in (0, 1):
        said = [
            Event(kind="load", rank=rank, seconds=2.0 + rank, read_bytes=100, time=planned + 3 + rank),
            Event(kind="starting", rank=rank, time=planned + 5, note=write_phases({"launch": 0.5, "imports": 4.5})),
            Event(kind="start", rank=rank, time=planned + 5),
            *(Event(kind="step", step=step, rank=rank, tokens=64, padding=16, seconds=[8, 8, 8, 2, 1, 2][step],
                    time=planned + 10 + step) for step in range(6)),
        ]  # fmt: skip
        run.event_file(rank).write_bytes(b"".join(map(encode, said)))
    peaks = [[Peak(100, 20, 130, 90)], [Peak(101, 21, 131, 91)]]
    write_result(run, run.plan(), Outcome(4, ((0, 2.0),)), answers=[], peaks=peaks, held=[HeldMemory(9, 8, 7, 6)] * 2)
    result = run.result()
    assert result is not None
    assert result["adapter_parameters"] == 6
    assert result["peak_bytes"] == result["peaks"][0][0] == {
        "allocated": 100, "context": 20, "reserved": 130, "load": 90
    }  # fmt: skip
    assert result["peaks"][1][0]["load"] == 91
    assert result["held"] == [{"weights": 9, "adapter": 8, "gradients": 7, "optimizer": 6}] * 2
    assert result["tokens_per_s"] == {"predicted": run.plan().tokens_per_second, "measured": 32.0}
    assert result["positions_per_s"] == {"predicted": run.plan().positions_per_second, "measured": 40.0}
    assert result["start_seconds"] == pytest.approx({"load": 4.0, "first_step": 10.0}, abs=1e-3)
    assert result["loading"] == {"seconds": 3.0, "read_bytes": 200}
    assert result["starting"] == {"launch": 0.5, "imports": 4.5, "first step": pytest.approx(5.0)}


def peft_over(base: Any, run: RunDir) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(run.adapter)).eval()


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox", "opt"])
def test_peft_alone_loads_the_adapter_and_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path / "model", family)
    job = real_job(folder, save_data(tmp_path / "d.jsonl"), tmp_path / "run", bits=16, seq_len=64)
    run, trained = adapted_run(job)
    base = load_plain(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    bare = logits_of(base, high=250)
    wrapped = logits_of(peft_over(base, run), high=250)
    assert torch.equal(wrapped, logits_of(trained, high=250))
    assert not torch.allclose(wrapped, bare, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [VOCAB, 270], ids=["spare rows", "added rows"])
def test_new_tokens_travel_with_the_adapter(tmp_path: Path, family: str, tied: bool, vocab: int) -> None:
    folder = save_model(tmp_path / "model", family, vocab_size=vocab, tie_word_embeddings=tied)
    data = save_data(tmp_path / "d.jsonl")
    job = real_job(folder, data, tmp_path / "run", bits=16, seq_len=64, new_tokens=["<call>", "<return>"])
    run, trained = adapted_run(job)
    rows = job.plan.source.vocab_rows
    assert rows is not None
    base = load_plain(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    if vocab < rows:
        base.resize_token_embeddings(rows, mean_resizing=False)
    high = job.plan.source.new_token_ids[-1] + 1
    used = [index for index in range(rows) if index < high]
    wrapped = logits_of(peft_over(base, run), high=high)
    assert torch.allclose(wrapped[..., used], logits_of(trained, high=high)[..., used], atol=1e-5)


def adapter_of(*shapes: tuple[int, ...]) -> Adapter:
    torch.manual_seed(0)
    return Adapter(nn.ParameterList(torch.randn(shape) for shape in shapes), lambda batch: batch)


def test_adapters_that_are_equal_have_one_checksum() -> None:
    assert adapter_checksum(adapter_of((5, 3), (7,))) == adapter_checksum(adapter_of((5, 3), (7,)))


@pytest.mark.parametrize("bit", range(32))
def test_one_bit_changes_the_checksum(bit: int) -> None:
    adapter = adapter_of((5, 3), (7,))
    before = adapter_checksum(adapter)
    words = list(adapter.parameters())[1].data.view(torch.int32)
    words[3] ^= torch.tensor(1, dtype=torch.int32) << bit
    assert adapter_checksum(adapter) != before


def test_two_numbers_in_each_others_place_change_the_checksum() -> None:
    adapter = adapter_of((5, 3), (7,))
    before = adapter_checksum(adapter)
    values = next(iter(adapter.parameters())).data
    values[[0, 1]] = values[[1, 0]]
    assert adapter_checksum(adapter) != before


def test_equal_tensors_in_each_others_place_change_the_checksum() -> None:
    one, other = adapter_of((5,), (5,)), adapter_of((5,), (5,))
    first, second = other.parameters()
    first.data, second.data = second.data, first.data
    assert adapter_checksum(one) != adapter_checksum(other)
