"""Evaluations of a run measure its tasks, choose the best checkpoint by them, and end a run that gets no better."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdist.core.errors import DataError, SpecError
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.scoring import Item, Scored
from qdist.core.spec.run_spec import resolve
from qdist.core.telemetry.events import Event
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.train import checkpoint
from qdist.runtime.train.loop import Trainer
from qdist.runtime.train.tasks import TaskMeter, cost_notes
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.tiny import real_job, save_data, save_model
from tests.runtime.train.test_checkpoint import state_of
from tests.runtime.train.test_loop import trainer_of

TASK = "mmlu:questions.jsonl"
TrainRun = Callable[[prepare.Launch], RunDir]


class Tally:
    """A task whose figure is the mean of what its items come to."""

    def __init__(self, name: str, *, count: int, rises: bool = True) -> None:
        self.name, self._count, self._rises = name, count, rises

    def items(self) -> list[Item]:
        return [Item((number,), (0,), (number,)) for number in range(self._count)]

    def result(self, scored: list[Scored]) -> TaskResult:
        value = sum(own.logprobs[0] for own in scored) / len(scored)
        return TaskResult(
            task=self.name, figures=(Figure(name="mean", value=value, count=1, more_is_better=self._rises),)
        )


class Scorer:
    longest = 8

    def score(self, items: Any, came_to: Callable[[int], None]) -> list[Scored]:
        for done in range(1, len(items) + 1):
            came_to(done)
        return [Scored((float(item.targets[0]),), (True,)) for item in items]


def test_a_meter_measures_every_task_and_tells_how_far_it_is_with_all_of_them() -> None:
    meter, told = TaskMeter({"one": Tally("one", count=2), "two": Tally("two", count=3)}, Scorer()), list[Any]()
    found = meter(lambda done, of: told.append((done, of)))
    assert {task: figure.value for task, figure in found.items()} == {"one": 0.5, "two": 1.0}
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_what_an_evaluation_computes_for_a_task_is_said_before() -> None:
    spec = resolve({"train": {"eval_steps": 10}})
    assert cost_notes(spec, {"a": Tally("a", count=3)}, steps=40) == [
        "evaluations score a: 3 tokens in 3 items, 5 times"
    ]
    assert cost_notes(spec, {"a": Tally("a", count=1)}, steps=None) == ["evaluations score a: 1 tokens in 1 item"]


def judged(values: list[float], tmp_path: Path, **settings: Any) -> tuple[Trainer, list[str], list[Event]]:
    """A trainer of 10 steps, evaluated every 2, whose task comes to these figures one after the other."""
    figures, done, events = iter(values), list[str](), list[Event]()
    samples: Any = SimpleNamespace(held_out=[])
    given = {"train.eval_steps": 2, "train.save_steps": 4, "train.keep": 1, "train.tasks": (TASK,), "steps": 10}
    trainer = trainer_of(samples, report=events.append, **given, **settings)
    trainer.run = RunDir(tmp_path)
    trainer._measure = lambda came_to: {TASK: Figure(name="macro", value=next(figures), count=4)}
    trainer._step = lambda step: bool(done.append(f"step {step + 1}"))  # type: ignore[func-returns-value,method-assign]

    def save(step: int) -> Path:
        done.append(f"save {step}")
        return checkpoint.save(trainer.run, trainer._progress(step, optimizer_steps=step), state_of(step), keep=1)

    trainer._save = save  # type: ignore[method-assign]
    trainer.engine = SimpleNamespace(replayed=None, restore=lambda state: done.append(f"load {state.optimizer_steps}"))  # type: ignore[assignment]
    return trainer, done, events


def test_the_best_checkpoint_is_that_of_the_task_and_a_run_without_patience_goes_on(tmp_path: Path) -> None:
    trainer, _, events = judged([0.2, 0.3, 0.5, 0.4, 0.4, 0.1], tmp_path)
    assert trainer.train()
    assert trainer.tasks == {TASK: ((0, 0.2), (2, 0.3), (4, 0.5), (6, 0.4), (8, 0.4), (10, 0.1))}
    assert trainer.run.checkpoint_steps() == [4, 10]
    assert checkpoint.load(trainer.run.checkpoint(10))[0].best_step == 4
    assert (trainer.ended_early, trainer.settle()) == ("", 10)
    assert [(event.task, event.figure, event.rises) for event in events if event.kind == "eval"][1] == (TASK, 0.3, True)


def test_a_run_that_gets_no_better_ends_with_its_best_adapter(tmp_path: Path) -> None:
    trainer, done, _ = judged([0.2, 0.5, 0.4, 0.4, 0.9], tmp_path, **{"train.patience": 2})
    assert trainer.train()
    assert done[-2:] == ["step 6", "save 6"]
    said = f"stopped early at step 6 of 10: {TASK} has not risen for 2 evaluations (0.5 at step 2)"
    assert trainer.ended_early == said
    assert trainer.run.checkpoint_steps() == [2, 6]
    assert trainer.outcome.steps == 6
    assert trainer.settle() == 2
    assert done[-1] == "load 2"


def test_a_run_killed_after_it_ended_early_ends_again_when_resumed_and_goes_on_with_more_patience(
    tmp_path: Path,
) -> None:
    assert judged([0.2, 0.5, 0.4, 0.4], tmp_path, **{"train.patience": 2})[0].train()
    again, done, events = judged([], tmp_path, **{"train.patience": 2})
    assert again.train()
    assert again.ended_early.startswith("stopped early at step 6 of 10")
    assert "step 7" not in done
    assert [event.kind for event in events] == ["resume"]
    longer, done, _ = judged([0.6, 0.7], tmp_path, **{"train.patience": 3})
    assert longer.train()
    assert (longer.ended_early, done[-2:]) == ("", ["step 10", "save 10"])
    assert checkpoint.load(longer.run.checkpoint(10))[0].best_step == 10


@pytest.mark.parametrize(
    ("settings", "message", "try_"),
    [
        ({"tasks": ("generate:a.jsonl",)}, "only probabilities are measured", "`qdist evaluate RUN --tasks generate:a"),
        ({"tasks": ("judge:a", "b")}, "only probabilities are measured", "`qdist evaluate RUN"),
        ({"tasks": ("loss",)}, "which every evaluation measures", "loss:FILE"),
        ({"best": "mmlu:a.jsonl"}, "train.best=mmlu:a.jsonl is not measured", "--set train.best=auto"),
        ({"best": "loss", "held_out": 0}, "train.best=loss needs held-out records", "--set train.held_out=0.1"),
        ({"patience": 2}, "train.patience=2 counts evaluations", "--set train.eval_steps=50"),
        ({"patience": 2, "held_out": 0, "save_steps": 5}, "train.patience needs held-out records", "train.patience=0"),
        ({"eval_steps": 2, "held_out": 0}, "need held-out records", "train.held_out"),
    ],
)
def test_contradictions_are_refused_with_a_way_out(settings: dict[str, Any], message: str, try_: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        resolve({"train": settings})
    assert try_ in caught.value.try_


@pytest.mark.parametrize(
    "settings",
    [
        {"tasks": ("mmlu:a.jsonl",), "held_out": 0, "eval_steps": 5, "patience": 2},
        {"tasks": ("mmlu:a.jsonl", "lm:b.yaml"), "best": "lm:b.yaml"},
        {"patience": 2, "eval_steps": 5, "best": "loss"},
    ],
)
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    assert resolve({"train": settings}).train.tasks == settings.get("tasks", ())


def write_questions(path: Path) -> Path:
    records = [
        {"question": f"hello {number}", "choices": ["a", "b", "c", "d"], "answer": number % 4, "subject": "there"}
        for number in range(5)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_task_whose_file_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="missing"):
        real_job(model, data, tmp_path / "run", train__tasks=(f"mmlu:{tmp_path / 'missing.jsonl'}",))
    with pytest.raises(SpecError, match="there is no file"):
        real_job(model, data, tmp_path / "run", train__tasks=(f"lm:{tmp_path / 'missing.yaml'}",))
    with pytest.raises(SpecError, match="there is no task called 'mmmlu'"):
        real_job(model, data, tmp_path / "run", train__tasks=("mmmlu:x",))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("placed", [{"gpus": 1}, {"gpus": 2, "placement": "shard"}, {"gpus": 2, "placement": "split"}])
def test_a_run_measures_its_tasks_wherever_its_model_lies_and_ends_early(
    placed: dict[str, Any], train: TrainRun, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(bos=False))
    task = f"mmlu:{write_questions(tmp_path / 'questions.jsonl')}"
    job = real_job(
        model, save_data(tmp_path / "data.jsonl"), tmp_path / "run", steps=8, train__eval_steps=1, train__patience=2,
        train__tasks=(task,), train__best=task, optim__lr=1e-9, train__save_steps=3, **placed,
    )  # fmt: skip
    assert any(note.startswith(f"evaluations score {task}: ") for note in job.notes)
    run = train(job)
    result: Any = run.result()
    assert result["steps"] == 2
    assert result["ended_early"].startswith(f"stopped early at step 2 of 8: {task} has not risen for 2 evaluations")
    assert [step for step, _ in result["tasks"][task]] == [0, 1, 2]
    events = [event for event in Follower(run.path).new_events() if event.rank == 0]
    assert [event.figure for event in events if event.task] == [figure for _, figure in result["tasks"][task]]
    assert events[-1].note == result["ended_early"]
    assert checkpoint.load(run.checkpoint(2))[0].best_step == 1
