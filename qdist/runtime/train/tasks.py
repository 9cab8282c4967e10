"""The tasks that every evaluation of a run in training measures: `train.tasks`."""

from collections.abc import Callable, Mapping
from typing import Any

from qdist.core.data.conversation import Wording
from qdist.core.errors import SpecError
from qdist.core.evaluation.results import Figure, ScoredTask
from qdist.core.evaluation.scoring import Scorer
from qdist.core.evaluation.words import task_words
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import counted
from qdist.runtime.data.wording import usual_wording
from qdist.runtime.evaluate.tasks import basis_of, open_task

Tasks = Mapping[str, ScoredTask]
"""Tasks by their words in `train.tasks`."""


def open_tasks(spec: RunSpec, tokenizer: Any, wording: Wording | None, *, longest: int) -> Tasks:
    """The tasks of a run. wording: of its records; None for the model's usual one.

    Raises SpecError for tasks that want answers, DataError for files that cannot be used.
    """
    basis = basis_of(spec, longest=longest)
    opened: dict[str, ScoredTask] = {}
    for text in spec.train.tasks:
        (word,) = task_words(text)
        opened[text] = open_task(word, tokenizer, wording or usual_wording(tokenizer), basis=basis)
    return opened


def cost_notes(spec: RunSpec, tasks: Tasks, *, steps: int | None) -> list[str]:
    """How much each evaluation computes for a task, as lines for people. steps: of the run; None if not known yet."""
    every = spec.train.eval_steps
    times = "" if steps is None else f", {counted(2 + (steps - 1) // every if every else 2, 'time')}"
    notes = []
    for text, task in tasks.items():
        items = task.items()
        tokens = sum(len(item.tokens) for item in items)
        notes.append(f"evaluations score {text}: {tokens:,} tokens in {counted(len(items), 'item')}{times}")
    return notes


class TaskMeter:
    """Measures a run's tasks with whatever scores its model. Collective where ranks hold the model."""

    def __init__(self, tasks: Tasks, scorer: Scorer) -> None:
        self._tasks, self._scorer = tasks, scorer
        self._items = {text: task.items() for text, task in tasks.items()}

    def __call__(self, came_to: Callable[[int, int], None]) -> dict[str, Figure]:
        """The first figure of each task. came_to: told how many items of all tasks are done, and how many there are."""
        total, done, figures = sum(map(len, self._items.values())), 0, dict[str, Figure]()
        for text, task in self._tasks.items():
            before = done

            def count(own: int, before: int = before) -> None:
                came_to(before + own, total)

            found = task.result(self._scorer.score(self._items[text], count))
            done += len(self._items[text])
            if not found.figures:
                raise SpecError(f"{text} has no figure to follow", try_="another task in train.tasks")
            figures[text] = found.figures[0]
        return figures
