"""A run over several sources, from its settings to the samples that its ranks see."""

import io
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from qdist.core.errors import DataError, RunError, SpecError
from qdist.core.spec.run_spec import resolve
from qdist.host.files import cache_path
from qdist.host.launch import claim
from qdist.host.launch import prepare as launcher
from qdist.host.launch.prepare import Launch
from qdist.host.launch.refusals import refuse_other_files
from qdist.runtime.data.batches import Samples, read_samples
from tests.runtime.tiny import real_job, save_data, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of its own, and data of 21, 6 and 3 records."""
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, count in (("a.jsonl", 21), ("b.jsonl", 6), ("c.jsonl", 3)):
        save_data(tmp_path / name, count)
    return tmp_path


def planned(model: Path, data: str, **settings: Any) -> Launch:
    return real_job(model, Path(data), Path("run"), **{"seq_len": 64, "global_batch": 6, **settings})


def seen(samples: Samples, steps: int, *, first: int = 0) -> Counter[int]:
    return Counter(index for step in range(first, steps) for micro_batch in samples.step(step) for index in micro_batch)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_mixture_gives_every_sample_as_often_as_planned_on_any_ranks(model: Path, ranks: int) -> None:
    job = planned(model, "a.jsonl:0.7,b.jsonl:0.3", data__eval="c.jsonl", steps=None, gpus=1, micro_batch=1)
    data = job.plan.data
    assert data is not None
    assert (data.mixture, data.train_samples, data.held_out_samples, job.plan.steps) == (30, 27, 3, 5)
    before = read_samples(job.plan, pad_id=0)
    after = read_samples(msgspec.structs.replace(job.plan, world_size=ranks, groups=ranks, packed=False), pad_id=0)
    both = seen(before, 2) + seen(after, 5, first=2)
    assert both == seen(before, 5)
    assert [count for index, count in both.items() if index < 21] == [1] * 21
    assert sum(count for index, count in both.items() if index >= 21) == 9
    assert before.held_out == [27, 28, 29]


def test_what_is_evaluated_on_and_trained_on_is_noted(model: Path) -> None:
    job = planned(model, "a.jsonl,b.jsonl", data__eval="c.jsonl")
    assert "6 of 27 training samples are in c.jsonl too, and evaluated on" in job.notes


def test_an_estimate_of_a_mixture_is_its_plan(model: Path) -> None:
    job = planned(model, "a.jsonl:0.7,b.jsonl:0.3", data__eval="c.jsonl", steps=None)
    shutil.rmtree(cache_path())
    preview = launcher.preview(msgspec.structs.replace(job.plan.spec, run="other"))
    assert preview.job is not None
    assert preview.job.plan.steps == job.plan.steps
    assert [work.what for work in preview.work if work.action == "tokenize"] == [
        "a.jsonl:0.7, b.jsonl:0.3, c.jsonl (30 records)"
    ]


def test_a_number_of_records_is_held_out(model: Path) -> None:
    job = planned(model, "a.jsonl", train__held_out=5)
    assert job.plan.data is not None
    assert (job.plan.data.train_samples, job.plan.data.held_out_samples) == (16, 5)
    with pytest.raises(DataError, match=r"train\.held_out=21 leaves none of 21 samples to train on") as caught:
        planned(model, "a.jsonl", train__held_out=21)
    assert caught.value.try_ == "--set train.held_out=2"


def test_bad_records_that_are_left_out_are_counted_in_the_plan(model: Path, here: Path) -> None:
    (here / "bad.jsonl").write_text('{"words": 1}\n' + (here / "a.jsonl").read_text())
    job = planned(model, "bad.jsonl", data__skip_bad=1)
    assert job.plan.data is not None
    assert (job.plan.data.bad, job.plan.data.samples) == (1, 21)
    assert any(note.startswith("1 of 22 records cannot be used and were left out: bad.jsonl:1") for note in job.notes)
    with pytest.raises(DataError, match=r"bad\.jsonl:1: keys words fit no known record format"):
        planned(model, "bad.jsonl")


def test_columns_of_other_names_are_read_by_every_step(model: Path, here: Path) -> None:
    (here / "d.jsonl").write_text("".join(f'{{"q": "how {n}", "a": "so {n}"}}\n' for n in range(9)))
    job = planned(model, "d.jsonl", data__columns=("prompt=q", "completion=a"))
    assert job.plan.data is not None
    assert (job.plan.data.samples, str(job.plan.wording)) == (9, "input-output, prompts as they are")
    shutil.rmtree(cache_path())
    preview = launcher.preview(msgspec.structs.replace(job.plan.spec, run="other"))
    assert preview.work[-1].what == "d.jsonl (9 records)"


def test_a_run_over_standard_input_goes_on_without_it(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO((here / "a.jsonl").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=content, isatty=lambda: False))
    job = planned(model, "-")
    claim.write(job)
    kept = Path(job.plan.spec.data.path)
    assert kept.read_bytes() == (here / "a.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", None)
    assert launcher.prepare_resume(job.run, {"steps": 9}).plan.data == job.plan.data


def test_a_source_that_changed_is_named_on_resuming(model: Path) -> None:
    job = planned(model, "a.jsonl:0.7,b.jsonl:0.3", data__eval="c.jsonl")
    claim.write(job)
    refuse_other_files(job.plan, job.run)
    save_data(Path("b.jsonl"), 7)
    with pytest.raises(RunError, match=r"^b\.jsonl is not what run was started with: .*, 31 records now"):
        refuse_other_files(job.plan, job.run)


def test_the_name_of_a_run_has_its_sources(model: Path) -> None:
    spec = resolve({"model": str(model), "data": "a.jsonl:0.7,b.jsonl:0.3", "seq_len": 64})
    preview = launcher.preview(spec)
    assert preview.run.path.name == f"{model.name}-qlora-a-b"


@pytest.mark.parametrize(
    ("data", "key"), [({"eval": "c.jsonl"}, "data.eval"), ({"skip_bad": 2, "roles": ["user=Q"]}, "data.roles and")]
)
def test_random_tokens_have_no_records_to_be_set(model: Path, data: dict[str, Any], key: str) -> None:
    spec = resolve({"model": str(model), "load_format": "dummy", "steps": 2, "run": "run", "data": data})
    with pytest.raises(SpecError, match=f"random weights train on random tokens, of which {key}"):
        launcher.preview(spec)


def test_a_dry_run_counts_what_standard_input_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(Path("a.jsonl").read_bytes()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    preview = launcher.preview(resolve({"model": str(model), "data": "-", "seq_len": 64, "run": "run"}))
    assert preview.knows_steps
    assert [work.what.partition(" ")[2] for work in preview.work if work.action == "tokenize"] == ["(21 records)"]
    assert not [work for work in preview.work if work.action == "fetch"]
