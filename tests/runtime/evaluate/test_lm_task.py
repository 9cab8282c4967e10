"""Tasks of lm-evaluation-harness come to the figures of its own backend for transformers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'qdist[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qdist.core.errors import DataError, MachineError, SpecError
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.runtime.engine.objective import unseen
from qdist.runtime.evaluate import lm_task
from qdist.runtime.evaluate.harness import HarnessModel
from qdist.runtime.evaluate.lm_task import LmTask
from qdist.runtime.infer.answerer import Question
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.evaluate.lm_bodies import CHOICES, ENDINGS, GENERATED, ROLLING, write_task
from tests.runtime.evaluate.local_scorer import LocalScorer
from tests.runtime.infer.answering import answered, line_of, one_by_one
from tests.runtime.tiny import tiny_model

LONGEST = 64


def own_result(task: LmTask, model: Any) -> TaskResult:
    scored = LocalScorer(model, longest=LONGEST).score(task.items(), unseen)
    return task.result(scored, answers(model, task.questions()))


def answers(model: Any, questions: Sequence[Question]) -> list[list[int]]:
    answerer = one_by_one(model, line=line_of(positions=LONGEST))
    return [found.tokens for found in answered(answerer, *questions)] if questions else []


def harness_result(file: str, model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
    """What lm_eval finds by itself."""
    own = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LONGEST, batch_size=2, device="cpu")
    found: Any = simple_evaluate(
        own, tasks=[file], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False), **options
    )
    return {
        key.removesuffix(",none"): value for key, value in found["results"]["local"].items() if key.endswith(",none")
    }


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (CHOICES, {}),
        (CHOICES + "num_fewshot: 2\nfewshot_split: test\n", {}),
        (CHOICES, {"limit": 3}),
        (ROLLING, {}),
        (GENERATED, {}),
        (ENDINGS, {}),
    ],
)
def test_figures_are_those_of_the_harness_itself(tmp_path: Path, body: str, options: dict[str, Any]) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=LONGEST), tiny_tokenizer(bos=False)
    file = write_task(tmp_path, body)
    task = LmTask(file, tokenizer, longest=LONGEST, **options)
    found = {figure.name: figure.value for figure in own_result(task, model).figures}
    wanted = harness_result(file, model, tokenizer, **options)
    assert found == pytest.approx({name: value for name, value in wanted.items() if "stderr" not in name}, rel=1e-6)
    assert found


@pytest.fixture
def task(tmp_path: Path) -> LmTask:
    return LmTask(write_task(tmp_path, CHOICES), tiny_tokenizer(), longest=LONGEST)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "settings", [{"until": ["e", "ss"]}, {"until": "\n\n", "max_gen_toks": 5}, {"max_gen_toks": 60}]
)
def test_answers_are_those_of_the_harness_itself(settings: dict[str, Any], bos: bool) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=LONGEST), tiny_tokenizer(bos=bos)
    texts = ["hello there", "user Human", "assistant " * 30, "<s>hello"]
    given = {"max_gen_toks": 12, **settings}
    requests = [Instance(request_type="generate_until", doc={}, arguments=(text, dict(given)), idx=0) for text in texts]
    own = HarnessModel(tokenizer, lambda items: [], lambda asked: answers(model, asked), longest=LONGEST)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LONGEST, batch_size=1, device="cpu")
    assert own.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = LmTask(write_task(tmp_path, CHOICES), tiny_tokenizer(), longest=LONGEST)
    own_result(task, tiny_model(max_position_embeddings=LONGEST))
    assert capfd.readouterr() == ("", "")


def test_choices_of_one_token_cost_one_pass_for_each_question(tmp_path: Path) -> None:
    body = CHOICES.replace("{{choices}}", "{{['a', 'b', 'c']}}").replace("acc_norm", "acc_mutual_info")
    task = LmTask(write_task(tmp_path, body), tiny_tokenizer(), longest=LONGEST)
    assert [len(item.positions) for item in task.items()] == [6, 6, 6, 6, 6, 6, 6, 6]


def test_a_figure_says_how_sure_it_is_and_what_each_document_gave(task: LmTask) -> None:
    found = own_result(task, tiny_model(max_position_embeddings=LONGEST))
    (accuracy, _), outcomes = found.figures, found.outcomes
    assert len(outcomes) == accuracy.count == 7
    assert sum(outcomes) / 7 == pytest.approx(accuracy.value)
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low < accuracy.value < accuracy.high


def test_a_perplexity_is_the_exponential_of_its_weighted_outcomes(tmp_path: Path) -> None:
    task = LmTask(write_task(tmp_path, ROLLING), tiny_tokenizer(), longest=LONGEST)
    found = own_result(task, tiny_model(max_position_embeddings=LONGEST))
    nats = sum(own * weight for own, weight in zip(found.outcomes, found.weights, strict=True)) / sum(found.weights)
    assert math.exp(nats) == pytest.approx(found.figures[0].value)
    assert not found.figures[0].more_is_better


def sample(**figures: Any) -> dict[str, Any]:
    return {"filter": "none", **figures}


@pytest.mark.parametrize(
    ("name", "value", "each", "outcomes"),
    [
        ("perplexity", math.exp(2.0), (-1.0, -3.0), (1.0, 3.0)),
        ("bits_per_byte", 1.0 / math.log(2), ((-2.0, 2), (-4.0, 4)), (1 / math.log(2), 1 / math.log(2))),
        ("acc", 0.5, (1, 0), (1.0, 0.0)),
        ("f1", 0.8, ((1, 1), (1, 2)), ()),
        ("bleu", 12.0, (("a", "b"), ("c", "d")), ()),
    ],
    ids=["log-probabilities", "bits", "right or wrong", "pairs of labels", "pairs of texts"],
)
def test_outcomes_are_those_whose_mean_the_figure_is(
    name: str, value: float, each: tuple[Any, ...], outcomes: tuple[float, ...]
) -> None:
    figure = Figure(name=name, value=value, count=2)
    assert lm_task._outcomes([sample(**{name: own}) for own in each], figure)[0] == pytest.approx(outcomes)


def test_a_group_shows_each_task_and_their_mean(tmp_path: Path) -> None:
    write_task(tmp_path, CHOICES, "one"), write_task(tmp_path, CHOICES, "two")
    loaded = {"one": 0.25, "two": 0.75}
    found: dict[str, Any] = {
        "results": {name: {"alias": name, "acc,none": value, "sample_len": 4} for name, value in loaded.items()},
        "samples": {name: [] for name in loaded},
        "higher_is_better": {name: {"acc": True} for name in loaded},
        "n-shot": {"one": 5, "two": 0},
    }
    result = lm_task._result("lm:both", found)
    assert [(figure.name, figure.value, figure.count) for figure in result.figures] == [("mean of acc", 0.5, 8)]
    assert {name: figure.value for name, figure in result.groups.items()} == loaded
    assert result.notes == ("one: 5 examples",)


def test_a_task_may_compute_its_metrics_itself(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def process(doc, results):\n    return {'own': float(doc['answer'])}\n")
    shared, _ = CHOICES.split("metric_list:")
    body = f"{shared}process_results: !function own.process\nmetric_list:\n  - {{metric: own, aggregation: mean}}\n"
    task = LmTask(write_task(tmp_path, body), tiny_tokenizer(), longest=LONGEST)
    found = own_result(task, tiny_model(max_position_embeddings=LONGEST))
    assert found.figures[0].name == "own"
    assert found.figures[0].value == pytest.approx(6 / 7)


def test_a_metric_that_is_no_number_is_named() -> None:
    found = {"results": {"one": {"f1,none": math.nan}}, "samples": {"one": []}, "higher_is_better": {}}
    with pytest.raises(DataError, match="finds f1,none of one to be nan"):
        lm_task._figures("one", found)


def test_questions_may_be_worded_by_the_chat_template(tmp_path: Path) -> None:
    file, tokenizer = write_task(tmp_path, GENERATED), tiny_tokenizer(CHATML, bos=False)
    plain = LmTask(file, tokenizer, longest=LONGEST).questions()[0]
    chat = LmTask(file, tokenizer, longest=LONGEST, chat=True).questions()[0]
    assert tokenizer.decode(plain.prompt) == "hello user 0"
    assert tokenizer.decode(chat.prompt) == "<|im_start|>user\nhello user 0<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(SpecError, match="the model has none"):
        LmTask(file, tiny_tokenizer(), longest=LONGEST, chat=True)


def test_draws_of_a_repeated_question_differ_in_their_seeds(tmp_path: Path) -> None:
    body = GENERATED.replace("do_sample: false, temperature: 0.0", "do_sample: true, temperature: 0.5, top_k: 3")
    asked = LmTask(write_task(tmp_path, body + "repeats: 2\n"), tiny_tokenizer(), longest=LONGEST).questions()
    assert [question.sampling.seed for question in asked] == list(range(14))
    assert (asked[0].sampling.temperature, asked[0].sampling.top_k) == (0.5, 3)
    assert asked[0].prompt == asked[1].prompt


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("do_sample: false", "num_beams: 4", DataError, "generation_kwargs of the task have num_beams"),
        ("max_gen_toks: 12", "max_gen_toks: 64", DataError, "max_gen_toks=64 of the task leaves none"),
        ("exact_match", "no_such_metric_at_all", SpecError, "lm_eval finds no metric called"),
        ("generate_until", "unheard_of", SpecError, "Got invalid output_type"),
        ("output_type:", "unsafe_code: true\noutput_type:", SpecError, "executes the code that a model writes"),
        ("output_type:", "doc_to_image: image\noutput_type:", SpecError, "asks about images or sound"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    tmp_path: Path, old: str, new: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LmTask(write_task(tmp_path, GENERATED.replace(old, new)), tiny_tokenizer(), longest=LONGEST)


def test_a_file_that_is_not_there_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"there is no file missing\.yaml"):
        LmTask("missing.yaml", tiny_tokenizer(), longest=LONGEST)
    monkeypatch.setattr(lm_task, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="need lm_eval") as found:
        LmTask("missing.yaml", tiny_tokenizer(), longest=LONGEST)
    assert "pip install 'qdist[lm-eval]'" in str(found.value)
