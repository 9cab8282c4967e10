"""What does a run directory say about its run?"""

from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import RunError
from qdist.core.planning.plan import VERSION, digest
from qdist.core.text import GIB
from qdist.host.run.rundir import RunDir, free_name, of_ranks
from tests.plans import CPU, gpus, planned

PLAN = planned("smollm2-135m", CPU)


def test_making_a_run_directory_touches_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert not run.exists()
    assert (run.result(), run.checkpoint_steps(), run.stop_requested()) == (None, [], False)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_read_back_as_it_was_launched(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(PLAN)))
    assert RunDir(tmp_path).exists()
    assert RunDir(tmp_path).checked_plan(digest(PLAN)) == PLAN


def test_a_plan_that_was_changed_after_the_launch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(PLAN, steps=PLAN.steps + 1)))
    with pytest.raises(RunError, match="but this run was launched with " + digest(PLAN)[:12]):
        RunDir(tmp_path).checked_plan(digest(PLAN))


@pytest.mark.parametrize("name", ["missing", "a_file", "empty"])
def test_what_is_not_a_run_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"is not a run: it has no plan\.json") as caught:
        RunDir(tmp_path / name).plan()
    assert caught.value.try_ == "a folder that `qdist launch` made"


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("llama-7b-demo", "runs/llama-7b-qlora-demo"),
        ("runs/llama-7b-qlora-dem", "runs/llama-7b-qlora-demo"),
        ("xyz", "runs/0, runs/1, runs/2, runs/3, runs/4"),
        ("runs", "runs/0, runs/1, runs/2, runs/3, runs/4"),
    ],
)
def test_a_run_that_is_not_there_names_the_nearest(
    name: str, attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in (*"012345", "llama-7b-qlora-demo"):
        Path("runs", there).mkdir(parents=True)
        Path("runs", there, "plan.json").touch()
    with pytest.raises(RunError) as caught:
        RunDir(Path(name)).plan()
    assert caught.value.try_ == attempt


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_a_plan_of_another_version_is_refused_before_its_fields_are_read(version: int, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(f'{{"version": {version}, "unheard_of": 1}}')
    with pytest.raises(RunError, match=f"plan version {version}, this one reads {VERSION}"):
        RunDir(tmp_path).plan()


def test_a_plan_of_the_version_before_is_read_as_one_of_this(tmp_path: Path) -> None:
    plan = planned("llama-7b", gpus(2, 80), {"max_memory": "64GiB"})
    older = msgspec.to_builtins(plan) | {"version": 2, "memory_cap_bytes": 64 * GIB}
    ((shape, count),) = (run.values() for run in older["facts"].pop("layers"))
    older["facts"] |= shape | {"layers": count, "norms_per_layer": shape["norms"]}
    del older["facts"]["norms"]
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(older))
    assert RunDir(tmp_path).plan() == plan
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(older | {"facts": {"layers": 32}}))
    with pytest.raises(RunError, match="is not a plan"):
        RunDir(tmp_path).plan()


def test_checkpoints_count_once_they_are_whole_and_in_order_of_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (20, 5, 1_000_000):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "DONE").touch()
    run.checkpoint(40).mkdir()
    assert run.checkpoint_steps() == [5, 20, 1_000_000]


def test_files_of_a_rank_sort_by_rank() -> None:
    run = RunDir("runs/a")
    assert str(run.event_file(7)) == "runs/a/events/rank007.jsonl"
    assert str(run.log_file(12)) == "runs/a/logs/rank012.log"


def test_a_result_and_a_request_to_stop_are_seen(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": 3}')
    (tmp_path / "stop").touch()
    assert RunDir(tmp_path).result() == {"steps": 3}
    assert RunDir(tmp_path).stop_requested()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plan.json", b"[]", "is not a JSON object"),
        ("plan.json", b"", "is not JSON"),
        ("plan.json", b"\xff\xfe\x00", "is not text"),
        ("plan.json", b"[" * 100_000, "is not JSON: nested too deeply"),
        ("plan.json", b'{"version": "\\ud800"}', "holds half of a surrogate pair"),
        ("result.json", b"[]", "is not a JSON object"),
        ("ended.json", b'{"state": "unheard of", "time": 1}', "is of another qdist"),
        ("machine.json", b'{"unheard_of": 1}', "is of another qdist"),
    ],
)
def test_a_file_that_is_not_ours_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} {said}"):
        getattr(RunDir(tmp_path), name.partition(".")[0])()


def test_a_free_name_is_one_that_nothing_has_not_even_a_broken_link(tmp_path: Path) -> None:
    assert free_name(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").symlink_to("nowhere")
    assert free_name(tmp_path, "a") == tmp_path / "a-3"


def test_what_somebody_copied_beside_ours_is_not_ours(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("step_000020", "step_1000000", "step_000020-keep", "step_20", "step_000030.bak", "xstep_000040"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "DONE").touch()
    assert run.checkpoint_steps() == [20, 1000000]
    for name in ("rank000.jsonl", "rank1000.jsonl", "rank000.jsonl~", "rank001-old.jsonl", "rank01.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in of_ranks(tmp_path, ".jsonl")] == ["rank000.jsonl", "rank1000.jsonl"]
    assert of_ranks(tmp_path / "none", ".jsonl") == []
