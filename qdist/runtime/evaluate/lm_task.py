"""A task of lm-evaluation-harness, by its name or as a YAML file, asked of a model of ours."""

import contextlib
import io
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import DataError, MachineError, SpecError
from qdist.core.evaluation.comparison import is_of_mean
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.scoring import Item, Scored
from qdist.core.evaluation.statistics import Interval, interval_of_mean, mean_of
from qdist.host.opening import told
from qdist.runtime.infer.answerer import Question

_FEWSHOT_SEED, _PYTHON_SEED, _NUMPY_SEED, _TORCH_SEED = 1234, 0, 1234, 1234
"""lm_eval's own, so that examples are drawn as in its command line."""


class LmTask:
    """A `ScoredTask` of one of lm_eval's tasks, groups or tags; where it `generates`, answers are wanted as well.

    Requests are built the same wherever they are built, so ranks may each build them.
    """

    def __init__(
        self, argument: str, tokenizer: Any, *, longest: int, limit: int | None = None, chat: bool = False,
        adapter: str = "",
    ) -> None:  # fmt: skip
        """argument: a name that lm_eval knows, or the path of a YAML file.

        tokenizer: of the model that is asked. longest: most tokens that it takes. limit: documents of each task.
        chat: word examples and questions by the tokenizer's chat template. adapter: that questions are for.

        Raises MachineError without lm_eval, SpecError for a task that cannot be opened or run here.
        """
        require_harness()
        self.name, self._limit, self._chat = f"lm:{argument}", limit, chat
        self._tokenizer, self._longest, self._adapter = tokenizer, longest, adapter
        if chat and not tokenizer.chat_template:
            raise SpecError(f"{self.name} is to be worded by a chat template, and the model has none", try_="no --chat")
        self._loaded = _load(argument)
        self._asked = self._ask()

    @property
    def generates(self) -> bool:
        """Whether the task wants texts, which training does not measure."""
        return bool(self._asked[1])

    def items(self) -> list[Item]:
        """What is asked, each text once."""
        return _merged(self._asked[0])

    def questions(self) -> list[Question]:
        """What is to be answered with new tokens."""
        return self._asked[1]

    def result(self, scored: Sequence[Scored], answers: Sequence[list[int]] = ()) -> TaskResult:
        """What lm_eval makes of the answers to `items()`, and of the new tokens for each of `questions()`."""
        from lm_eval.evaluator import evaluate

        known = _split(self._asked[0], self.items(), scored)
        model = self._model(lambda items: [known[item] for item in items], lambda questions: list(answers))
        with _quiet(self.name):
            self._reseed()
            found = evaluate(
                model, self._loaded, limit=self._limit, bootstrap_iters=0, apply_chat_template=self._chat,
                fewshot_as_multiturn=self._chat,
            )  # fmt: skip
        return _result(self.name, found)

    def _ask(self) -> tuple[list[Item], list[Question]]:
        """Everything that the task's requests come to, in lm_eval's order."""
        items, questions = list[Item](), list[Question]()

        def collect(asked: list[Item]) -> list[Scored]:
            items.extend(asked)
            return [Scored((0.0,) * len(item.positions), (False,) * len(item.positions)) for item in asked]

        def put(asked: list[Question]) -> list[list[int]]:
            questions.extend(asked)
            return [[] for _ in asked]

        model = self._model(collect, put)
        for kind, requests in self._requests(model).items():
            getattr(model, kind)(requests)
        return items, questions

    def _requests(self, model: Any) -> dict[str, list[Any]]:
        """All requests by their kind, repeated where the task repeats them."""
        found = defaultdict[str, list[Any]](list)
        with _quiet(self.name):
            self._reseed()
            for task in self._loaded["tasks"].values():
                task.build_all_requests(
                    limit=self._limit,
                    apply_chat_template=self._chat,
                    fewshot_as_multiturn=self._chat,
                    chat_template=model.apply_chat_template if self._chat else None,
                    tokenizer_name=model.tokenizer_name if self._chat else "",
                )
                for request in task.instances:
                    found[request.request_type].extend([request] * request.repeats)
        return found

    def _model(self, score: Any, answer: Any) -> Any:
        from qdist.runtime.evaluate.harness import HarnessModel

        return HarnessModel(self._tokenizer, score, answer, longest=self._longest, adapter=self._adapter)

    def _reseed(self) -> None:
        """Have examples drawn from the start, so that each build of the requests draws the same."""
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def require_harness() -> None:
    """Raise MachineError where lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MachineError("tasks of lm-evaluation-harness need lm_eval", try_="pip install 'qdist[lm-eval]'")


def _load(argument: str) -> Any:
    """lm_eval's tasks by a name or YAML file. Raises SpecError for what cannot be opened or run."""
    name = f"lm:{argument}"
    is_file = argument.endswith((".yaml", ".yml"))
    if is_file and not Path(argument).is_file():
        raise SpecError(f"there is no file {argument}", try_="the path of a task's YAML file, or a name of lm_eval's")
    with _quiet(name):
        from lm_eval.tasks import TaskManager

        # Reading all of its tasks takes seconds: a task in a file needs none of them, a group may.
        needs_others = not is_file or re.search("^group:", Path(argument).read_text(encoding="utf-8"), re.MULTILINE)
        loaded = TaskManager(include_defaults=bool(needs_others)).load([argument])
    for task in loaded["tasks"].values():
        _require_runnable(name, task)
    return loaded


def _require_runnable(name: str, task: Any) -> None:
    """Raise SpecError for a task that models here cannot be asked, or that lm_eval cannot measure."""
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"{name} asks about images or sound, and models here read text", try_="another task")
    if getattr(task, "UNSAFE_CODE", False):
        raise SpecError(f"{name} executes the code that a model writes", try_="lm_eval itself, in a container")
    with _quiet(name):
        unknown = list(_unknown_metrics(task))
    if unknown:
        raise SpecError(f"{name}: lm_eval finds no metric called {unknown[0]!r}", try_="acc or exact_match")


def _unknown_metrics(task: Any) -> Iterator[str]:
    """Metrics that lm_eval finds nowhere. A task with its own `process_results` computes its metrics itself."""
    from lm_eval.api.registry import get_metric

    if task.config.process_results is not None:
        return
    for own in task.config.metric_list or ():
        name = own["metric"]
        if isinstance(name, str) and get_metric(name, own.get("hf_evaluate") is True) is None:
            yield name


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A block of lm_eval's: it prints nothing, leaves random numbers as they were, and errors are of the task."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.random.fork_rng(devices=[]),
        told(name, SpecError, try_="`lm_eval ls tasks` for names, `lm_eval validate --tasks NAME` for more"),
    ):
        random.seed(_PYTHON_SEED)
        numpy.random.seed(_NUMPY_SEED)
        torch.default_generator.manual_seed(_TORCH_SEED)
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


def _merged(items: Sequence[Item]) -> list[Item]:
    """Items of the same tokens as one, in order: choices of one token behind a question cost one pass."""
    by_tokens = defaultdict[tuple[int, ...], dict[Item, None]](dict)
    for item in items:
        by_tokens[item.tokens][item] = None
    return [
        Item(tokens, tuple(at for own in same for at in own.positions), tuple(to for own in same for to in own.targets))
        for tokens, same in by_tokens.items()
    ]


def _split(items: Sequence[Item], merged: Sequence[Item], scored: Sequence[Scored]) -> dict[Item, Scored]:
    """The answer to each item, from those to `_merged(items)`."""
    rest = {item.tokens: zip(own.logprobs, own.greedy, strict=True) for item, own in zip(merged, scored, strict=True)}
    found = dict[Item, Scored]()
    for item in dict.fromkeys(items):
        pairs = [next(rest[item.tokens]) for _ in item.positions]
        found[item] = Scored(tuple(logprob for logprob, _ in pairs), tuple(greedy for _, greedy in pairs))
    return found


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    """Figures of one task; of several, the groups' own, or the mean of each task's first figure."""
    own = {task: _figures(task, found) for task in found["samples"]}
    notes = tuple(f"{task}: {shots} examples" for task, shots in found["n-shot"].items() if task in own and shots)
    if len(own) == 1:
        ((task, figures),) = own.items()
        outcomes, weights = _outcomes(found["samples"][task], figures[0])
        return TaskResult(task=name, figures=figures, outcomes=outcomes, weights=weights, notes=notes)
    first = {task: figures[0] for task, figures in own.items()}
    above = [figure for group in found.get("groups", {}) for figure in _figures(group, found)]
    return TaskResult(task=name, figures=tuple(above) or (_mean(list(first.values())),), groups=first, notes=notes)


def _figures(task: str, found: Mapping[str, Any]) -> tuple[Figure, ...]:
    """A task's or group's metrics, in lm_eval's order; a filter's name behind a comma, unless it is `none`.

    Raises DataError for one that is NaN or infinite.
    """
    samples = found["samples"].get(task, [])
    better = found["higher_is_better"].get(task, {})
    values = {
        key: float(value)
        for key, value in found["results"][task].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    for key, value in values.items():
        if not math.isfinite(value):
            raise DataError(f"lm_eval finds {key} of {task} to be {value}", try_="more documents, or another metric")
    count = int(found["results"][task].get("sample_len", len(samples)))
    return tuple(_figure(key, value, samples, better, count) for key, value in values.items())


def _figure(key: str, value: float, samples: Sequence[Any], better: Mapping[str, bool], count: int) -> Figure:
    metric, _, filter_name = key.partition(",")
    sure = _interval(value, [own[metric] for own in samples if own["filter"] == filter_name and metric in own])
    return Figure(
        name=metric if filter_name == "none" else key,
        value=value,
        count=count,
        low=sure and sure.low,
        high=sure and sure.high,
        more_is_better=better.get(metric) is not False,
    )


def _interval(value: float, each: Sequence[Any]) -> Interval | None:
    """The 95 % interval of a mean; None for a figure that is not the mean of the documents' own."""
    numbers = [float(own) for own in each if isinstance(own, int | float)]
    if not numbers or len(numbers) != len(each) or not math.isclose(mean_of(numbers), value):
        return None
    return interval_of_mean(numbers)


def _outcomes(samples: Sequence[Mapping[str, Any]], figure: Figure) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(what each document contributes to a figure, its weight), such as nats a word and words.

    Nothing where the figure is neither their mean nor its exponential.
    """
    metric, _, filter_name = figure.name.partition(",")
    each = [own[metric] for own in samples if own["filter"] == (filter_name or "none") and metric in own]
    for outcomes, weights in _readings(each):
        if is_of_mean(figure, mean_of(outcomes, weights)):
            return outcomes, weights
    return (), ()


def _readings(each: Sequence[Any]) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """What documents' own figures may contribute: themselves, log-probabilities, or those of so many words or bytes."""
    if each and all(isinstance(own, int | float) for own in each):
        yield tuple(map(float, each)), ()
        yield tuple(-float(own) for own in each), ()
    elif each and all(_is_rate(own) for own in each):
        weights = tuple(float(units) for _, units in each)
        yield tuple(-total / units for total, units in each), weights
        yield tuple(-total / units / math.log(2) for total, units in each), weights  # bits, not nats


def _is_rate(own: Any) -> bool:
    """Whether it is a number of so many units."""
    numbers = isinstance(own, tuple) and len(own) == 2 and all(isinstance(part, int | float) for part in own)
    return numbers and own[1] > 0


def _mean(figures: Sequence[Figure]) -> Figure:
    """The mean of several tasks' first figures, each task weighing the same."""
    return Figure(
        name=f"mean of {figures[0].name}",
        value=sum(own.value for own in figures) / len(figures),
        count=sum(own.count for own in figures),
        more_is_better=figures[0].more_is_better,
    )
