"""Does `qdist report` write a whole page of any run, in which nothing of a run's text is markup?"""

import json
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult, What
from qdist.core.telemetry.events import Event, encode
from qdist.host.run.evaluations import add_evaluation
from qdist.host.run.rundir import RunDir, note, noted
from tests.plans import CPU, planned

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def run_of(folder: Path, *, steps: int = 5, result: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A run directory of two CPU ranks, as far as a report reads it."""
    plan = planned("smollm2-135m", CPU, {"gpus": 2, **settings})
    (folder / "events").mkdir(parents=True)
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    (folder / "versions.json").write_text('{"python": "3.11.7", "torch": "2.13.0"}')
    (folder / "recipe.toml").write_text('model = "smollm2-135m"\n')
    events = [Event(kind="start", total_steps=5, time=1.0)]
    events += [
        Event(
            kind="step", step=number, total_steps=5, loss=3.0 / number, learning_rate=1e-4, gradient_norm=0.5,
            tokens=1000, own_tokens=500, seconds=2.0, data_s=0.01, busy_s=1.5, update_s=0.1, memory_bytes=10**9,
            time=1.0 + 2 * number,
        )
        for number in range(1, steps + 1)
    ]  # fmt: skip
    events += [Event(kind="checkpoint", step=steps, time=20.0), Event(kind="eval", step=steps, held_out_loss=2.0)]
    (folder / "events" / "rank000.jsonl").write_bytes(b"".join(map(encode, events)))
    if result is not None:
        peak = {"allocated": 0, "context": 10**9, "reserved": 0, "load": 0}
        held = {"weights": 10**8, "adapter": 10**7, "gradients": 10**7, "optimizer": 2 * 10**7}
        usual = {"steps": 5, "peaks": [[peak], [peak]], "held": [held, held], "answers": []}
        (folder / "result.json").write_text(json.dumps(usual | result))
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def written(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return Path(done.output.splitlines()[-1].rpartition(":")[0]).read_text()


class Page(HTMLParser):
    """Elements of a page, and what its attributes point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(written(run_of(tmp_path / "r", result={})))
    assert page.links == ["data:,"]
    assert (page.tags.count("script"), page.tags.count("link")) == (3, 1)


def test_the_command_says_where_the_page_is_and_how_large(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r")
    assert invoke(run).output.startswith(f"{run}/report.html: ")
    assert invoke(run, "--out", tmp_path / "x.html").output.startswith(f"{tmp_path}/x.html: ")
    assert {path.name for path in tmp_path.iterdir()} == {"r", "x.html"}


def test_what_a_model_says_is_never_markup(tmp_path: Path) -> None:
    answer = {"question": EVIL, "before": EVIL, "after": EVIL, "expected": EVIL}
    clean = Page(written(run_of(tmp_path / "a", result={"answers": [answer | dict.fromkeys(answer, "x")]})))
    run = run_of(tmp_path / EVIL.replace("/", "_"), result={"answers": [answer]})
    note(RunDir(run), ["qdist", "launch", EVIL])
    (run / "recipe.toml").write_text(EVIL)
    (run / "versions.json").write_text(json.dumps({EVIL: EVIL, "torch": EVIL}))
    text = written(run)
    assert "<img" not in text
    assert Page(text).tags.count("script") == 3
    assert Page(text).tags.count("section") == clean.tags.count("section") == 11


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, steps: int) -> None:
    run = run_of(tmp_path / "r", steps=steps)
    (run / "events" / "rank000.jsonl").write_bytes(b"") if not steps else None
    text = written(run)
    assert ("No step was done yet." in text) == (steps == 0)


def test_a_failed_run_says_why_and_what_to_try(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r")
    ended = {"state": "failed", "message": "rank 1 ran out of memory", "try_": "--set micro_batch=1", "time": 1.0}
    (run / "ended.json").write_text(json.dumps(ended))
    text = written(run)
    assert "Failed at step 5 of 5." in text
    assert "rank 1 ran out of memory" in text
    assert "--set micro_batch=1" in text


def test_two_runs_are_compared_and_neither_report_is_lost(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a", result={}), run_of(tmp_path / "b", **{"optim.lr": 1e-3})
    written(a)
    before = (a / "report.html").read_bytes()
    text = written(a, b)
    assert "<td>0.0002</td><td>0.001</td>" in text
    assert ((a / "report.html").read_bytes(), (a / "comparison.html").exists()) == (before, True)


def test_three_runs_are_refused(tmp_path: Path) -> None:
    done = invoke("a", "b", "c")
    assert (done.exit_code, "compares two, not 3" in done.output) == (2, True)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = invoke(tmp_path)
    assert (done.exit_code, "is not a run" in done.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    done = invoke(run_of(tmp_path / "r"), "--out", tmp_path / "absent" / "x.html")
    assert (done.exit_code, "cannot be written" in done.output) == (2, True)


def test_commands_are_kept_as_they_were_typed(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r")
    typed = ["/venv/bin/qdist", "launch", "--model", "my model", "--set", "lora.r=8"]
    note(RunDir(run), typed)
    note(RunDir(run), ["qdist", "launch", "--resume", "--run", "two\nlines"])
    first, second = noted(RunDir(run))
    assert shlex.split(first) == ["qdist", *typed[1:]]
    assert second == "qdist launch --resume --run 'two'$'\\n''lines'"
    assert "qdist launch --model &#x27;my model&#x27; --set lora.r=8" in written(run)


def test_a_run_without_a_command_names_its_recipe(tmp_path: Path) -> None:
    assert "qdist launch recipe.toml --run NEW_RUN" in written(run_of(tmp_path / "r"))


def test_a_launch_keeps_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdist.cli import launch
    from qdist.core.errors import RunError

    def fails(*_: object, **__: object) -> None:
        raise RunError("no ranks today")

    monkeypatch.setattr(launch.ranks, "start", fails)
    arguments = ["launch", "--model", "smollm2-135m", "--load-format", "dummy", "--set", "steps=2", "--run"]
    monkeypatch.setattr(sys, "argv", ["qdist", *arguments, "r"])
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "r")])
    assert "no ranks today" in done.output
    assert noted(RunDir(tmp_path / "r")) == (f"qdist {' '.join(arguments)} r",)


def evaluated(run: Path, what: What, right: int) -> None:
    result = TaskResult(
        task=f"mmlu:data/{EVIL}.jsonl",
        figures=(Figure(name="accuracy", value=right / 100, count=100),),
        groups={f"law {EVIL}": Figure(name="accuracy", value=0.5, count=100)},
        outcomes=(1.0,) * right + (0.0,) * (100 - right),
        notes=(EVIL,),
    )
    add_evaluation(run, Evaluation(target=str(run), what=what, results=(result,)))


def test_what_tasks_found_is_on_the_page_and_printed(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    evaluated(run, "base", 30)
    evaluated(run, "adapter", 60)
    done = invoke(run)
    assert done.exit_code == 0, done.output
    assert "accuracy  0.3 (0.219 to 0.396)  0.6 (0.502 to 0.691)" in done.output
    text = (run / "report.html").read_text()
    assert "<td>better</td>" in text
    assert "0.6 (0.502 to 0.691)" in text
    assert EVIL not in text


def test_two_runs_are_compared_by_tasks_too(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name) for name in "ab"]
    for run, right in zip(runs, (30, 60), strict=True):
        evaluated(run, "adapter", right)
    text = written(*runs)
    assert "What tasks found" in text
    assert "adapter of b against adapter of a" in text
