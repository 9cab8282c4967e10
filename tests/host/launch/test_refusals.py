"""What a launch refuses before it starts anything: small disks, other data, ranks that are still there."""

import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.errors import PlanError, RunError
from qdist.core.planning.plan import DataFacts, Plan
from qdist.core.spec.run_spec import resolve
from qdist.core.spec.sections import Data
from qdist.host import files
from qdist.host.data.records import source_digest
from qdist.host.data.sources import digest_over, digests_of, parts_of, sources_of
from qdist.host.launch import claim, prepare, refusals
from qdist.host.launch.refusals import (
    await_ranks,
    refuse_other_data,
    refuse_other_files,
    refuse_running,
    refuse_small_disk,
    refuse_unwritable,
)
from qdist.host.run.rundir import LOCK, RunDir
from qdist.host.run.state import Holder, launcher_is_gone, sign

FACTS = DataFacts(path="cache/one.safetensors", samples=9, train_samples=8, held_out_samples=1, tokens=1200, longest=64)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was planned, of 100 steps and an adapter of rank 8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = {"model": "smollm2-135m", "load_format": "dummy", "steps": 100, "seq_len": 64, "lora": {"r": 8}}
    job = prepare.prepare(resolve(settings, {"run": "run"}))
    claim.write(job)
    return job.run


# --- disks --------------------------------------------------------------------------------------------------------


def with_free(mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, refusals):
        monkeypatch.setattr(module, "free_bytes", lambda folder: mib << 20)


@pytest.mark.parametrize(
    ("free_mib", "keep", "attempt"),
    [
        (40, 2, "make room there"),
        (70, 5, "--set train.keep=1, or make room there"),
        (20, 5, "make room there"),
    ],
)
def test_a_disk_without_room_for_checkpoints_is_refused_with_what_would_do(
    run: RunDir, free_mib: int, keep: int, attempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replaced(run.plan(), steps=1000, keep=keep)
    with_free(free_mib, monkeypatch)
    said = rf"keeping {keep + 1} checkpoints of 27.9 MiB and an adapter of 9.3 MiB needs \d+.* in run, which has"
    with pytest.raises(PlanError, match=said) as caught:
        refuse_small_disk(plan, run)
    assert caught.value.try_ == attempt
    if "keep" in attempt:
        refuse_small_disk(replaced(plan, steps=1000, keep=1), run)


def replaced(plan: Plan, *, steps: int, keep: int) -> Plan:
    train = msgspec.structs.replace(plan.spec.train, keep=keep)
    return msgspec.structs.replace(plan, steps=steps, spec=msgspec.structs.replace(plan.spec, train=train))


def test_a_new_run_may_lie_on_another_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(20, monkeypatch)
    with pytest.raises(PlanError) as caught:
        refuse_small_disk(run.plan(), RunDir("new"))
    assert caught.value.try_ == "a --run folder on another disk"


def test_checkpoints_that_are_there_need_no_room_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(40, monkeypatch)
    run.checkpoint(50).mkdir()
    with open(run.checkpoint(50) / "optimizer.safetensors", "wb") as file:
        file.truncate(28 << 20)
    refuse_small_disk(run.plan(), run)


def test_a_run_directory_below_a_file_is_refused(run: RunDir) -> None:
    Path("file").touch()
    with pytest.raises(RunError, match=r"file/run cannot be written: .*/file is a file"):
        refuse_unwritable(RunDir("file/run"))


# --- data ---------------------------------------------------------------------------------------------------------


def trained_on(run: RunDir, **changes: Any) -> Plan:
    """The run's plan as if it had been started with `data.jsonl`, which is written here."""
    Path("data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    plan = run.plan()
    spec = msgspec.structs.replace(plan.spec, data=Data(path="data.jsonl"))
    return msgspec.structs.replace(plan, spec=spec, data=msgspec.structs.replace(FACTS, **changes))


def test_the_same_data_under_another_cache_are_the_same(run: RunDir) -> None:
    trained_on(run)
    old = trained_on(run, digest=source_digest("data.jsonl"))
    refuse_other_files(old, run)
    refuse_other_data(old, msgspec.structs.replace(FACTS, path="elsewhere/one.safetensors"), run)


def test_files_that_changed_are_refused_before_they_are_tokenized(run: RunDir) -> None:
    old = trained_on(run, digest="of before")
    with pytest.raises(RunError, match="9 samples and 1,200 tokens then, 2 records now") as caught:
        refuse_other_files(old, run)
    assert caught.value.message.startswith("data.jsonl is not what run was started with: ")
    assert caught.value.try_ == "put the file back, or start a new run"


def test_of_several_sources_those_that_changed_are_named(run: RunDir) -> None:
    old = trained_on(run)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        Path(name).write_text(f'{{"text": "{name}"}}\n')
    data = Data(path="a.jsonl:0.7,b.jsonl:0.3", eval="c.jsonl")
    parts = parts_of(sources_of(data), (0, 5, 8, 9), digests_of(data))
    facts = msgspec.structs.replace(FACTS, parts=parts, digest=digest_over(digests_of(data)))
    spec = msgspec.structs.replace(old.spec, data=data)
    old = msgspec.structs.replace(old, spec=spec, data=facts)
    refuse_other_files(old, run)
    for name in ("b.jsonl", "c.jsonl"):
        Path(name).write_text('{"text": "another"}\n')
    with pytest.raises(RunError, match=r"^b\.jsonl and c\.jsonl are not what run was started with: .*, 3 records now"):
        refuse_other_files(old, run)
    changed = parts_of(sources_of(data), (0, 5, 8, 9), digests_of(data))
    now = msgspec.structs.replace(facts, path="cache/two.safetensors", parts=changed, digest="another")
    with pytest.raises(RunError, match=r"^b\.jsonl and c\.jsonl are not what run was started with"):
        refuse_other_data(old, now, run)


def test_data_that_were_tokenized_to_something_else_are_refused_with_both_counts(run: RunDir) -> None:
    """A run of a qdist that kept no digest of its files."""
    now = msgspec.structs.replace(FACTS, path="cache/two.safetensors", samples=8, tokens=1100)
    old = trained_on(run)
    refuse_other_files(old, run)
    with pytest.raises(RunError, match="9 samples and 1,200 tokens then, 8 samples and 1,100 tokens now"):
        refuse_other_data(old, now, run)


def test_the_same_files_that_give_other_tokens_are_not_blamed(run: RunDir) -> None:
    now = msgspec.structs.replace(FACTS, path="cache/two.safetensors", tokens=1100, digest="same")
    with pytest.raises(RunError, match=r"gives other tokens now: .*1,200 tokens then, .*1,100 tokens now") as caught:
        refuse_other_data(trained_on(run, digest="same"), now, run)
    assert "versions.json" in caught.value.try_


# --- ranks of a killed launch -------------------------------------------------------------------------------------


@pytest.fixture
def lock(run: RunDir) -> int:
    """The run's lock, held."""
    descriptor = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def orphan(lock: int) -> None:
    """As if a launcher on this machine had taken the lock that is not there any more."""
    sign(lock)
    held = msgspec.json.decode(os.pread(lock, 1000, 0), type=Holder)
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(msgspec.structs.replace(held, began="1")), 0)


def test_a_resume_waits_until_the_ranks_of_a_killed_launch_are_gone(run: RunDir, lock: int) -> None:
    orphan(lock)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.close(lock)

    await_ranks(run, say)
    assert said == ["waiting for the ranks of the launch before to end"]
    refuse_running(run)


def test_a_resume_does_not_wait_for_ever(run: RunDir, lock: int) -> None:
    orphan(lock)
    said: list[str] = []
    await_ranks(run, said.append, patience_s=0.0)
    assert len(said) == 1
    with pytest.raises(RunError, match="is being trained by another process"):
        refuse_running(run)
    os.close(lock)


@pytest.mark.parametrize("signed", [True, False], ids=["a launcher that lives", "one that left no name"])
def test_a_run_in_training_is_refused_at_once(run: RunDir, lock: int, signed: bool) -> None:
    if signed:
        sign(lock)
    said: list[str] = []
    await_ranks(run, said.append)
    assert (said, launcher_is_gone(run)) == ([], False)
    os.close(lock)


def test_a_launcher_of_another_machine_is_not_taken_for_dead(run: RunDir, lock: int) -> None:
    os.pwrite(lock, msgspec.json.encode(Holder(pid=1 << 30, host="elsewhere", began="1")), 0)
    assert not launcher_is_gone(run)
    os.close(lock)
