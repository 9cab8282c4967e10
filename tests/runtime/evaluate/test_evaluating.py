"""Runs and models, evaluated by ranks on every placement: the same figures, those of a plain loop."""

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from qdist.core.errors import DataError, JobError, RunError, SpecError
from qdist.core.evaluation.asked import Asked
from qdist.core.evaluation.job import FOUND, JOB, EvaluationJob
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.core.planning.plan import Prepared, digest
from qdist.core.requests import PrepareModel
from qdist.core.spec.run_spec import RunSpec
from qdist.core.telemetry.events import Event
from qdist.host import tasks
from qdist.host.launch.agent import EVALUATOR
from qdist.host.launch.claim import Claim
from qdist.host.launch.evaluating import evaluate, groups_of
from qdist.host.opening import read_typed
from qdist.host.run.evaluations import read_evaluations
from qdist.host.run.rundir import RunDir
from qdist.runtime.data.batches import read_samples
from qdist.runtime.data.tokenized import IGNORED
from qdist.runtime.train.prepare import run_model
from tests.host.evaluation.test_generation import answering, data
from tests.runtime.evaluate.lm_bodies import CHOICES, GENERATED, write_task
from tests.runtime.merging import merge
from tests.runtime.placements.test_conformance import LAID
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model

ForkRanks = Callable[..., list[int]]
WORDS = "hello there system user assistant Human "


class Found:
    """Ranks that have ended, and left a made-up result of each model."""

    def __init__(self, own: Claim) -> None:
        job = read_typed(own.job.run.path / JOB, EvaluationJob, RunError)
        figure = Figure(name="loss", value=1.5, count=2)
        found = [
            Evaluation(
                target=each.target,
                what=each.what,
                results=(TaskResult(task="loss", figures=(figure,)),),
                step=each.step,
            )
            for each in job.subjects
        ]
        (own.job.run.path / FOUND).write_bytes(msgspec.json.encode(found))

    def poll(self) -> int | None:
        return 0

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int:
        return 0


class Interrupted:
    """Ranks that work until Ctrl-C, and then end at once."""

    def __init__(self, own: Claim) -> None:
        self.folder, self._ended = own.job.run.path, False

    def poll(self) -> int | None:
        if not self._ended:
            signal.raise_signal(signal.SIGINT)
        return 0 if self._ended else None

    def stop(self) -> None:
        self._ended = True

    def kill(self) -> None:
        self._ended = True

    def wait(self) -> int:
        return 0


class Forked:
    """Ranks that have ended by the time they are asked for."""

    def __init__(self, fork: ForkRanks, own: Claim) -> None:
        run, plan = own.job.run, own.job.plan
        self._code = max(fork(EVALUATOR, plan.world_size, run.path, "--digest", digest(plan)), key=abs)

    def poll(self) -> int | None:
        return self._code

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int:
        return self._code


def prepared(spec: RunSpec, *, device: str | None = None) -> Prepared:
    """A model prepared in this process."""
    return msgspec.json.decode(msgspec.json.encode(run_model(PrepareModel(spec=spec))), type=Prepared)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_model(folder / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def trained(folder: Path, model: Path) -> tuple[RunDir, Any]:
    data = save_data(folder / "data.jsonl")
    return adapted_run(real_job(model, data, folder / "run", bits=16, train__held_out=0.2), scale=0.3)


@pytest.fixture(scope="module")
def asked_tasks(folder: Path) -> str:
    text, questions, more = folder / "text.txt", folder / "mmlu.jsonl", folder / "more.jsonl"
    text.write_text(WORDS * 30)
    lines = [
        {
            "subject": f"s{number % 3}",
            "input": f"{WORDS * (number % 4)}{number}?\nAnswer:",
            "output": "ABCD"[number % 4],
        }
        for number in range(11)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_data(more, 7)
    return f"loss,loss:{more},perplexity:{text},mmlu:{questions}"


def evaluated(
    fork_ranks: ForkRanks, target: Path, words: str, settings: dict[str, Any], **asked: Any
) -> tuple[list[Evaluation], list[Event]]:
    events: list[Event] = []
    found = evaluate(
        Asked(targets=(str(target),), tasks=words, **asked),
        settings,
        JudgeSettings(),
        show=events.extend,
        say=lambda line: None,
        backend=lambda own: Forked(fork_ranks, own),
    )
    return found, events


@pytest.fixture(scope="module")
def alone(fork_ranks: ForkRanks, trained: Any, asked_tasks: str) -> list[Evaluation]:
    found, events = evaluated(fork_ranks, trained[0].path, asked_tasks, {}, beside=("base",), window=48, stride=32)
    scored = [event for event in events if event.kind == "scored"]
    assert {event.note.rpartition(", ")[2] for event in scored} == {"base", "adapter"}
    assert scored[-1].step == scored[-1].total_steps == 11
    return found


def test_figures_of_the_adapter_and_its_base_are_those_of_a_plain_loop(alone: list[Evaluation], trained: Any) -> None:
    run, model = trained
    assert [each.what for each in alone] == ["base", "adapter"]
    assert alone[1].step == run.plan().steps
    samples = read_samples(run.plan(), pad_id=0)
    with model.disable_adapter():
        base = plain_loss(model, samples)
    for each, loss in zip(alone, (base, plain_loss(model, samples)), strict=True):
        assert each.results[0].figures[0].value == pytest.approx(loss, abs=1e-5)
    assert alone[0].results[0].figures[0].value != pytest.approx(alone[1].results[0].figures[0].value, abs=1e-2)


def plain_loss(model: Any, samples: Any) -> float:
    total = count = 0.0
    for index in samples.held_out:
        span = samples.tokenized.span(index)
        ids, labels = (each[span].long()[None] for each in samples.tokenized[:2])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != IGNORED).sum())
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("name", LAID)
def test_figures_do_not_depend_on_placement_and_ranks(
    name: str, fork_ranks: ForkRanks, trained: Any, asked_tasks: str, alone: list[Evaluation]
) -> None:
    found, _ = evaluated(fork_ranks, trained[0].path, asked_tasks, LAID[name], beside=("base",), window=48, stride=32)
    for own, other in zip(found, alone, strict=True):
        for result, expected in zip(own.results, other.results, strict=True):
            assert result.outcomes == pytest.approx(expected.outcomes, abs=1e-5)
            assert result.groups == expected.groups
            for figure, wanted in zip(result.figures, expected.figures, strict=True):
                assert math.isclose(figure.value, wanted.value, rel_tol=1e-6)


def test_a_run_keeps_what_was_found_of_it(alone: list[Evaluation], trained: Any) -> None:
    assert list(read_evaluations(trained[0].path)[: len(alone)]) == alone


def test_a_model_is_evaluated_as_it_lies(
    fork_ranks: ForkRanks, model: Path, asked_tasks: str, alone: list[Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "prepare_model", prepared)
    words = asked_tasks.partition(",")[2].partition(",")[2]  # without losses, which a run words
    (found,), _ = evaluated(fork_ranks, model, words, {}, window=48, stride=32)
    assert found.what == "model"
    for result, expected in zip(found.results, alone[0].results[2:], strict=True):
        assert result.figures[0].value == pytest.approx(expected.figures[0].value, rel=1e-6)


@pytest.fixture
def another(trained: Any, tmp_path: Path) -> RunDir:
    """A copy of the run, to which a test may add."""
    shutil.copytree(trained[0].path, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations*"))
    return RunDir(tmp_path / "run")


def test_answers_stand_beside_scores_and_all_are_kept_and_on_the_card(another: RunDir, folder: Path) -> None:
    answer, asked = answering(["hello"] * 3)
    asking = Asked(targets=(str(another.path),), tasks=f"loss,generate:{data(folder)}", beside=("base",), batch=2)
    found = evaluate(
        asking, {}, JudgeSettings(), show=lambda events: None, say=lambda line: None, backend=Found,
        answer=answer,
    )  # fmt: skip
    assert [(own.what, own.results[0].task.partition(":")[0]) for own in found] == [
        ("base", "loss"), ("adapter", "loss"), ("base", "generate"), ("adapter", "generate"),
    ]  # fmt: skip
    assert [(own.adapter, own.batch) for own in asked] == [("base", 2), ("run", 2)]
    assert list(read_evaluations(another.path)) == found
    card = (another.adapter / "README.md").read_text()
    assert "| loss | loss | adapter | 1.5" in card
    assert "| generate:test.jsonl | rouge1 | adapter |" in card


def test_ctrl_c_leaves_nothing_behind(
    another: RunDir, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tasks, "prepare_model", prepared)
    before = sorted(another.path.rglob("*"))
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    for target in (another.path, model):
        asking = Asked(targets=(str(target),), tasks=f"perplexity:{text}")
        with pytest.raises(KeyboardInterrupt):
            evaluate(asking, {}, JudgeSettings(), show=lambda events: None, say=lambda line: None, backend=Interrupted)
    assert sorted(another.path.rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_merged_model_stands_beside_its_adapter(
    fork_ranks: ForkRanks, another: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(another, another.path / "merged", onto="original", dtype=torch.float32)
    monkeypatch.setattr(tasks, "prepare_model", prepared)
    found, _ = evaluated(fork_ranks, another.path, "loss", {}, beside=("merged",))
    assert [own.what for own in found] == ["adapter", "merged"]
    adapter, merged = (own.results[0] for own in found)
    assert merged.outcomes == pytest.approx(adapter.outcomes, abs=1e-3)
    assert merged.weights == adapter.weights
    assert list(read_evaluations(another.path)) == found


def test_the_loss_is_of_held_out_samples(model: Path, another: RunDir) -> None:
    for target, message in ((model, "has no held-out samples"), (another.path, "the tokens of .* are not in")):
        if target == another.path:
            plan = another.plan()
            gone = msgspec.structs.replace(plan, data=msgspec.structs.replace(plan.data, path="/gone"))
            (another.path / "plan.json").write_bytes(msgspec.json.encode(gone))
        with pytest.raises(SpecError, match=message):
            evaluate(
                Asked(targets=(str(target),), tasks="loss"), {}, JudgeSettings(), show=lambda events: None,
                say=lambda line: None, backend=Found,
            )  # fmt: skip


def test_ranks_that_fail_are_told_by_their_log(fork_ranks: ForkRanks, trained: Any, folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text('{"no": "text"}\n' * 2)
    with pytest.raises(JobError, match="the ranks ended"):
        evaluated(fork_ranks, trained[0].path, f"perplexity:{bad}", {})


def test_a_file_without_questions_is_refused_before_anything_is_started(
    fork_ranks: ForkRanks, trained: Any, folder: Path
) -> None:
    bad = folder / "none.jsonl"
    bad.write_text('{"input": "Why?", "output": "Because."}\n')
    with pytest.raises(DataError, match=r"none\.jsonl:1: the answer is 'Because\.'") as caught:
        evaluated(fork_ranks, trained[0].path, f"mmlu:{bad}", {})
    assert caught.value.try_.startswith("records with ")


@pytest.mark.parametrize(
    ("settings", "asked", "error", "message"),
    [
        ({"bits": 8}, {}, SpecError, "bits is of"),
        ({}, {"beside": ("merged",)}, RunError, "no merged model"),
    ],
)
def test_what_a_run_cannot_be_evaluated_as_is_refused(
    trained: Any, settings: dict[str, Any], asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    target = str(trained[0].path)
    with pytest.raises(error, match=message):
        list(groups_of(target, Asked(targets=(target,), tasks="loss", **asked), settings))


def test_a_model_has_nothing_beside_it(model: Path) -> None:
    with pytest.raises(SpecError, match="--beside is of runs"):
        list(groups_of(str(model), Asked(targets=(str(model),), tasks="loss", beside=("base",)), {}))


def test_tasks_of_lm_eval_are_measured_and_answered_by_ranks(fork_ranks: ForkRanks, trained: Any, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'qdist[lm-eval]'")
    words = f"lm:{write_task(folder, CHOICES, 'chosen')},lm:{write_task(folder, GENERATED, 'written')}"
    laid = [{"gpus": gpus, "placement": "replicate"} for gpus in (1, 2)]
    one, two = (evaluated(fork_ranks, trained[0].path, words, settings)[0][0].results for settings in laid)
    assert [result.figures[0].name for result in one] == ["acc", "exact_match"]
    assert [result.figures for result in one] == [result.figures for result in two]
