"""Is a judge on loopback asked once for each verdict, within its limits, whatever its server does in between?"""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from qdist.core.errors import DataError, JobError, MachineError, QdistError, RunError, SpecError
from qdist.core.evaluation.judging import JudgeSettings
from qdist.host.evaluation.endpoint import Endpoint, Said
from qdist.host.evaluation.judge import run_elo, run_judge
from tests.core.evaluation.test_elo import TRUTH, games_of

KEY = "sk-secret-of-the-tests"
Answer = Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]
"""Status, body and headers to a request's body."""


class Judge(ThreadingHTTPServer):
    """A server of OpenAI's protocol that answers as a function says; what was asked is kept."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.answer: Answer = lambda body: said(longer(body))
        self.lock = Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            status, told, headers = self.server.answer(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(told.encode() if isinstance(told, str) else json.dumps(told).encode())

    def log_message(self, *_: Any) -> None:
        """Silence."""


def said(text: str, tokens: int = 100) -> tuple[int, Any, dict[str, str]]:
    return 200, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}}, {}


def longer(body: dict[str, Any]) -> str:
    """The verdict of a judge that likes long answers; alone they get their length as a grade."""
    text = body["messages"][1]["content"]
    lengths = [len(part.split("\n", 1)[1].split("\n[End")[0]) for part in text.split("[Start of the answer")[1:]]
    if len(lengths) == 1:
        return f"Short.\n[[{lengths[0]}]]"
    return "Hm.\n" + ("[[A]]" if lengths[0] > lengths[1] else "[[B]]" if lengths[0] < lengths[1] else "[[C]]")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Judge()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def predictions(folder: Path, name: str, answers: list[str]) -> Path:
    path = folder / f"{name}.jsonl"
    lines = [
        {"prompt": [{"role": "user", "content": f"Question {n}?"}], "prediction": answer}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(judge: Judge, **more: Any) -> JudgeSettings:
    return JudgeSettings(judge_url=judge.url, judge_model="judge-1", judge_workers=2, **more)


def test_two_files_are_compared_in_both_orders(tmp_path: Path, judge: Judge) -> None:
    one = predictions(tmp_path, "one", ["long enough"] * 6 + ["x"] * 2)
    other = predictions(tmp_path, "other", ["short"] * 6 + ["y", "yes"])
    result = run_judge(f"{one},{other}", settings(judge))
    assert (result.figures[0].name, result.figures[0].count) == ("win rate of one", 8)
    assert result.outcomes == (1.0,) * 6 + (0.5, 0.0)
    assert len(judge.asked) == 16
    assert judge.keys == {f"Bearer {KEY}"}
    assert {body["model"] for body in judge.asked} == {"judge-1"}
    assert KEY not in (tmp_path / "one-verdicts.jsonl").read_text()


def test_what_was_judged_is_not_asked_again(tmp_path: Path, judge: Judge) -> None:
    files = [predictions(tmp_path, name, [name] * 3) for name in ("one", "other")]
    argument, verdicts = ",".join(map(str, files)), tmp_path / "one-verdicts.jsonl"
    first = run_judge(argument, settings(judge))
    whole = verdicts.read_bytes()
    verdicts.write_bytes(whole[:-25])  # as a kill leaves it
    assert run_judge(argument, settings(judge)) == first
    assert len(judge.asked) == 7
    predictions(tmp_path, "other", ["other", "changed", "other"])
    run_judge(argument, settings(judge))
    assert len(judge.asked) == 9


def test_requests_are_limited_and_the_rest_comes_later(tmp_path: Path, judge: Judge) -> None:
    files = [predictions(tmp_path, name, [name] * 5) for name in ("one", "other")]
    argument = ",".join(map(str, files))
    result = run_judge(argument, settings(judge, judge_limit=4))
    assert (len(judge.asked), result.figures[0].count) == (4, 2)
    assert "6 of 10 verdicts were not asked for, by the limit" in result.notes[0]
    assert run_judge(argument, settings(judge)).figures[0].count == 5
    assert len(judge.asked) == 10


def test_tokens_are_limited(tmp_path: Path, judge: Judge) -> None:
    path = predictions(tmp_path, "one", ["four"] * 50)
    result = run_judge(str(path), settings(judge, judge_tokens=500))
    assert 5 <= len(judge.asked) <= 6
    assert result.figures[0].count == len(judge.asked)


def test_a_limit_that_allows_no_comparison_says_what_to_do(tmp_path: Path, judge: Judge) -> None:
    files = [predictions(tmp_path, name, [name]) for name in ("one", "other")]
    with pytest.raises(RunError, match="none of 1 verdicts") as caught:
        run_judge(",".join(map(str, files)), settings(judge, judge_limit=1))
    assert "goes on" in caught.value.try_


def test_a_judge_that_never_comes_to_a_verdict_is_to_be_another(tmp_path: Path, judge: Judge) -> None:
    judge.answer = lambda body: said("Both have their merits.")
    with pytest.raises(RunError, match="none of 1 verdicts") as caught:
        run_judge(str(predictions(tmp_path, "one", ["a"])), settings(judge))
    assert "--judge-model" in caught.value.try_


def test_one_file_is_graded(tmp_path: Path, judge: Judge) -> None:
    path = predictions(tmp_path, "one", ["four", "seven.."])
    result = run_judge(str(path), settings(judge))
    assert (result.figures[0].name, result.figures[0].value, result.outcomes) == ("grade", 5.5, (4.0, 7.0))


def test_a_busy_server_is_asked_again_after_the_time_it_names(judge: Judge) -> None:
    answers = [(429, "slow down", {"Retry-After": "9"}), (503, "", {}), said("yes", 7)]
    judge.answer = lambda body: answers[len(judge.asked) - 1]
    pauses: list[float] = []
    with Endpoint(judge.url, "m", pause=pauses.append) as endpoint:
        assert endpoint.ask("s", "t", max_new_tokens=5) == Said("yes", 7)
    assert pauses == [9.0, 2.0]


def test_a_server_that_is_not_there_is_tried_and_named() -> None:
    pauses: list[float] = []
    with (
        Endpoint("http://127.0.0.1:9", "m", pause=pauses.append) as endpoint,
        pytest.raises(JobError, match="7 attempts") as caught,
    ):
        endpoint.ask("s", "t", max_new_tokens=5)
    assert pauses == [1, 2, 4, 8, 16, 32]
    assert "goes on" in caught.value.try_


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, MachineError, "refuses the key"),
        (404, SpecError, "has no model 'm'"),
        (400, JobError, "refuses (400)"),
        (200, JobError, "not OpenAI's protocol"),
    ],
)
def test_refusals_are_told_without_the_key(judge: Judge, status: int, kind: type[QdistError], words: str) -> None:
    judge.answer = lambda body: (status, f"Incorrect API key provided: {KEY}", {})
    with Endpoint(judge.url, "m", key=KEY, pause=[].append) as endpoint, pytest.raises(kind) as caught:
        endpoint.ask("s", "t", max_new_tokens=5)
    assert words in caught.value.message
    assert KEY not in str(caught.value)
    assert len(judge.asked) == 1


def test_models_that_take_neither_temperature_nor_max_tokens_are_asked_without(judge: Judge) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if "max_tokens" in body:
            return 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", {}
        if "temperature" in body:
            return 400, "Unsupported value: 'temperature' does not support 0", {}
        return said("yes")

    judge.answer = answer
    with Endpoint(judge.url, "m", pause=[].append) as endpoint:
        endpoint.ask("s", "t", max_new_tokens=5)
        endpoint.ask("s", "t", max_new_tokens=5)
    assert len(judge.asked) == 4
    assert judge.asked[-1]["max_completion_tokens"] == 5


def test_a_judge_that_says_nothing_leaves_no_file(tmp_path: Path, judge: Judge) -> None:
    judge.answer = lambda body: (400, "no", {})
    path = predictions(tmp_path, "one", ["a"])
    with pytest.raises(JobError):
        run_judge(str(path), JudgeSettings(judge_url=judge.url, judge_model="m"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_verdicts_that_came_beside_an_error_are_kept(tmp_path: Path, judge: Judge) -> None:
    judge.answer = lambda body: (400, "no", {}) if "Question 1" in body["messages"][1]["content"] else said("[[5]]")
    path = predictions(tmp_path, "one", ["a"] * 2)
    with pytest.raises(JobError, match="refuses"):
        run_judge(str(path), settings(judge))
    assert len((tmp_path / "one-verdicts.jsonl").read_text().splitlines()) == 1


def test_a_file_that_holds_no_verdicts_is_not_touched(tmp_path: Path, judge: Judge) -> None:
    path, other = predictions(tmp_path, "one", ["a"]), tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(RunError, match=r"notes\.txt"):
        run_judge(str(path), settings(judge), out=other)
    assert other.read_text() == "mine"


@pytest.mark.parametrize(("answers", "said"), [(["x"], "1 lines, not 2"), (["x", "y", "z"], "3 lines, not 2")])
def test_files_of_different_questions_are_refused(tmp_path: Path, judge: Judge, answers: list[str], said: str) -> None:
    one, other = predictions(tmp_path, "one", ["a", "b"]), predictions(tmp_path, "other", answers)
    with pytest.raises(DataError, match=said):
        run_judge(f"{one},{other}", settings(judge))
    assert judge.asked == []


def test_a_judge_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="none is named"):
        run_judge(str(predictions(tmp_path, "one", ["a"])), JudgeSettings())


def test_ratings_of_the_predecessors_kind_give_the_known_ranking(tmp_path: Path) -> None:
    by_pair: dict[tuple[str, str], list[Any]] = {}
    for game in games_of(TRUTH, 120):
        by_pair.setdefault((game.first, game.second), []).append(game)
    for (first, second), games in by_pair.items():
        lines = [{"question_id": own.question, "score": {1.0: 1, 0.0: 2, 0.5: 3}[own.score]} for own in games]
        lines.append({"question_id": "last", "score": -1})
        (tmp_path / f"{first}-vs-{second}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_elo(",".join(str(path) for path in sorted(tmp_path.iterdir())))
    assert [figure.name for figure in result.figures] == [f"Elo of {name}" for name in TRUTH]
    for figure, elo in zip(result.figures, TRUTH.values(), strict=True):
        assert (figure.low or 0) <= elo <= (figure.high or 0)
    assert result.notes[0] == "10 records have no verdict and are left out"


def test_what_qdist_generate_writes_can_be_judged(tmp_path: Path, judge: Judge) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}], "answer": "So"}) + "\n")
    assert run_judge(str(path), settings(judge)).figures[0].value == 2.0


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path, judge: Judge) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:1 is not a prediction"):
        run_judge(str(path), settings(judge))
