"""A dry run foresees what a launch prepares, and a resumed run goes on with the data it was started with alone."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from qdist.core.errors import ModelError, RunError
from qdist.core.planning.plan import Prepared, digest
from qdist.core.spec.run_spec import RunSpec
from qdist.host import tasks
from qdist.host.files import cache_path
from qdist.host.launch import claim
from qdist.host.launch import prepare as launcher
from qdist.host.launch.prepare import Launch
from qdist.runtime.train.prepare import prepare
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of its own."""
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def started(model: Path, here: Path) -> Launch:
    job = real_job(model, save_data(here / "data.jsonl"), here / "run", seq_len=64)
    claim.write(job)
    return job


def resumed(job: Launch, **changes: Any) -> Launch:
    """The rest of a run, prepared in this process."""

    def prepared(spec: RunSpec, *, device: str) -> Prepared:
        return msgspec.json.decode(msgspec.json.encode(prepare(spec)), type=Prepared)

    with mock.patch.object(tasks, "prepare", prepared):
        return launcher.prepare_resume(job.run, changes)


def actions(preview: launcher.Preview) -> list[tuple[str, bool]]:
    return [(work.action, work.there is not None) for work in preview.work]


def test_a_dry_run_estimates_first_and_knows_the_plan_once_a_launch_has_prepared_it(model: Path, here: Path) -> None:
    wanted = msgspec.structs.replace(started(model, here).plan.spec, run=str(here / "new"))
    shutil.rmtree(cache_path())
    before = launcher.preview(wanted)
    assert actions(before) == [("pack", False), ("tokenize", False)]
    assert not cache_path().exists()
    job = real_job(model, here / "data.jsonl", here / "new", seq_len=64)
    after = launcher.preview(wanted)
    assert actions(after) == [("pack", True), ("tokenize", True)]
    assert after.job is not None
    assert after.job.plan == job.plan
    packed, tokenized = after.work
    assert job.plan.data is not None
    assert (str(packed.there), str(tokenized.there)) == (job.plan.source.packed, job.plan.data.path)


def again(model: Path, here: Path, **settings: Any) -> Launch | None:
    """The same launch again; None if it asked for preparation."""
    asked: list[RunSpec] = []

    def prepared(spec: RunSpec, *, device: str) -> Prepared:
        asked.append(spec)
        return msgspec.json.decode(msgspec.json.encode(prepare(spec)), type=Prepared)

    spec = real_job(model, here / "data.jsonl", here / "new", **{"seq_len": 64, **settings}).plan.spec
    with mock.patch.object(tasks, "prepare", prepared):
        job = launcher.prepare(msgspec.structs.replace(spec, run=str(here / "newer")))
    return None if asked else job


def test_what_is_there_already_is_not_prepared_by_another_process(model: Path, here: Path) -> None:
    first = started(model, here)
    job = again(model, here)
    assert job is not None
    assert (job.plan.source, job.plan.data) == (first.plan.source, first.plan.data)


def test_another_chat_template_gives_other_tokens_and_is_saved(model: Path, here: Path) -> None:
    file = here / "own.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ 'assistant: ' }}"
    )
    own, named = (
        started(model, here),
        real_job(model, here / "data.jsonl", here / "named", seq_len=64, data__template="ziya"),
    )
    filed = real_job(model, here / "data.jsonl", here / "filed", seq_len=64, data__template=str(file))
    paths = [job.plan.data.path for job in (own, named, filed) if job.plan.data]
    assert len(set(paths)) == 3
    assert "<human>:" in (Path(named.plan.source.tokenizer) / "chat_template.jinja").read_text()
    assert (Path(filed.plan.source.tokenizer) / "chat_template.jinja").read_text() == file.read_text()
    assert "chat template ziya" in " ".join(named.notes)
    file.write_text(file.read_text().replace("assistant: ", "answer: ").replace("{{ m.role }}", "answer"))
    changed = real_job(model, here / "data.jsonl", here / "changed", seq_len=64, data__template=str(file))
    assert changed.plan.data is not None
    assert changed.plan.data.path not in paths


def test_a_run_goes_on_without_the_file_of_its_chat_template(model: Path, here: Path) -> None:
    file = here / "own.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ 'assistant: ' }}"
    )
    job = real_job(model, save_data(here / "data.jsonl"), here / "run", seq_len=64, data__template=str(file))
    claim.write(job)
    file.unlink()
    assert resumed(job).plan.data == job.plan.data


def test_weights_that_changed_within_the_same_size_and_time_are_prepared(model: Path, here: Path) -> None:
    mine = here / "mine"
    shutil.copytree(model, mine)
    started(mine, here)
    weights = mine / "model.safetensors"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[-4:] = b"1234"
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match=r"was packed when .* held other weights"):
        again(mine, here)


def test_a_plan_does_not_go_by_the_micro_batches_of_another_global_batch(model: Path, here: Path) -> None:
    first = started(model, here).plan.data
    job = real_job(model, here / "data.jsonl", here / "new", seq_len=64, global_batch=6)
    assert first is not None
    assert job.plan.data is not None
    sizes = [[fullest.samples for fullest in data.fullest] for data in (first, job.plan.data)]
    assert set(sizes[0]) == {1, 2, 4}
    assert set(sizes[1]) == {1, 2, 3, 6}


def test_what_is_packed_is_as_large_as_was_foreseen(model: Path, here: Path) -> None:
    job = started(model, here)
    shutil.rmtree(cache_path())
    pack, _ = launcher.preview(msgspec.structs.replace(job.plan.spec, run=str(here / "new"))).work
    resumed(job)
    weights = sum(file.stat().st_size for file in Path(job.plan.source.packed).glob("*.safetensors"))
    assert pack.size_bytes is not None
    assert pack.size_bytes < weights < pack.size_bytes + (40 << 10)  # headers and quantization records, 14 linears


def test_a_run_whose_cache_was_lost_goes_on_with_the_same_file(model: Path, here: Path) -> None:
    job = started(model, here)
    shutil.rmtree(cache_path())
    preview = launcher.preview_resume(job.run, {})
    assert actions(preview) == [("pack", False), ("tokenize", False)]
    assert not cache_path().exists()
    again = resumed(job)
    assert again.plan.data == job.plan.data
    assert preview.job is not None
    assert preview.job.plan == again.plan


def test_a_run_whose_cache_was_lost_does_not_go_on_over_another_model(here: Path, model: Path) -> None:
    changing = shutil.copytree(model, here / "model")
    job = started(changing, here)
    shutil.rmtree(cache_path())
    save_model(changing, seed=1)
    for go_on in (lambda: resumed(job), lambda: launcher.preview_resume(job.run, {})):
        with pytest.raises(RunError, match=f"{changing} is not the model that {job.run.path} was trained on"):
            go_on()
    assert not cache_path().exists()


@pytest.mark.parametrize("has_digest", [True, False], ids=["with a digest", "of a qdist that kept none"])
def test_a_run_whose_data_changed_is_refused_and_goes_on_once_they_are_put_back(
    model: Path, here: Path, has_digest: bool
) -> None:
    job = started(model, here)
    assert job.plan.data is not None
    if not has_digest:
        data = msgspec.structs.replace(job.plan.data, digest="", parts=())
        plan = msgspec.structs.replace(job.plan, data=data)
        files = {**job.files, "plan.json": msgspec.json.encode(plan).decode()}
        claim.write(job._replace(files=files, resumes=digest(job.plan)))
    shutil.rmtree(cache_path())
    kept = (here / "data.jsonl").read_text()
    save_data(here / "data.jsonl", 41)
    now = "41 records" if has_digest else "41 samples and"
    with pytest.raises(RunError, match=rf"data\.jsonl is not what .*: 40 samples and .* tokens then, {now}") as caught:
        resumed(job)
    assert caught.value.try_.startswith("put the file back")
    if has_digest:
        with pytest.raises(RunError, match="is not what"):
            launcher.preview_resume(job.run, {})
        assert not cache_path().exists()
    (here / "data.jsonl").write_text(kept)
    assert resumed(job).plan.steps == job.plan.steps


def test_a_run_with_its_tokens_goes_on_and_says_that_the_file_changed(model: Path, here: Path) -> None:
    job = started(model, here)
    assert resumed(job).notes == ()
    save_data(here / "data.jsonl", 41)
    again = resumed(job)
    assert again.plan.data == job.plan.data
    assert again.notes == (
        f"{here}/data.jsonl has changed since: the run goes on with the 40 samples it was started with",
    )


def test_a_run_with_a_checkpoint_is_prepared_again_without_the_adapter_it_started_from(model: Path, here: Path) -> None:
    data = save_data(here / "data.jsonl")
    first, _ = adapted_run(real_job(model, data, here / "first", seq_len=64))
    job = real_job(model, data, here / "second", seq_len=64, adapter=str(first.path))
    run = claim.write(job)
    shutil.rmtree(cache_path())
    shutil.rmtree(first.path)
    with pytest.raises(RunError, match="starts from it: there is no checkpoint yet"):
        resumed(job)
    run.checkpoint(2).mkdir()
    (run.checkpoint(2) / "DONE").touch()
    shutil.rmtree(cache_path())
    assert resumed(job).plan.start == job.plan.start
