"""Prompts are dealt to copies of a model evenly, and their answers come together in the file's order."""

import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError, JobError, PlanError
from qdist.core.requests import Answer, Generate
from qdist.host import children
from qdist.host.machine.nvml import Card
from qdist.runtime.infer import copies
from qdist.runtime.infer.copies import _require_success, _Watch, copies_for, dealt
from qdist.runtime.infer.generate import generate_file
from qdist.runtime.infer.kept import Answered, Kept, closing
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.tiny import save_model


def said(text: str, *, tokens: int = 1, after_s: float = 1.0) -> Answered:
    return Answered(text=text, prompt_tokens=3, new_tokens=tokens, finish="stop", after_s=after_s)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_answer_has_one_copy_and_none_has_two_more_than_another(count: int) -> None:
    order = list(range(100, 83, -1))
    shares = [dealt(order, number, count) for number in range(count)]
    assert sorted(chain(*shares), reverse=True) == order
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [share[0] for share in shares] == order[:count]


def request(**more: Any) -> Generate:
    return Generate(run="run", prompts="p", out="o", batch=8, **more)


@pytest.mark.parametrize(
    ("more", "waiting", "free", "chosen"),
    [
        ({}, 100, (9, 9, 9), "012"),
        ({}, 100, (9, 1, 9), "02"),
        ({}, 9, (9, 9, 9), "01"),
        ({}, 8, (9, 9, 9), "0"),
        ({"gpus": 2}, 100, (9, 9, 9), "01"),
        ({"gpus": 3}, 2, (9, 9, 9), "01"),
        ({}, 100, (1, 1), ""),
        ({"gpus": 1}, 100, (1, 1), ""),
    ],
)
def test_a_copy_goes_to_each_gpu_that_holds_one_and_has_a_batch_to_answer(
    more: dict[str, int], waiting: int, free: tuple[int, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, free)
    found = copies_for(request(**more), 10, waiting)
    assert found == [{"CUDA_VISIBLE_DEVICES": f"GPU-{number}"} for number in chosen]


def show(monkeypatch: pytest.MonkeyPatch, free: tuple[int, ...]) -> None:
    """A machine with these GPUs, of which those with 5 free bytes hold a copy."""
    cards = [
        Card(uuid=f"GPU-{n}", position=n, name="H200", total_bytes=9, free_bytes=own) for n, own in enumerate(free)
    ]
    monkeypatch.setattr(copies, "shown_cards", lambda: cards)
    monkeypatch.setattr(copies, "holds_copy", lambda target, free, *_, **__: free > 5)
    monkeypatch.setattr(copies.torch.cuda, "is_available", lambda: True)


def test_more_copies_than_gpus_hold_are_refused_with_the_tokens_that_they_are_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    show(monkeypatch, (9, 1))
    with pytest.raises(PlanError, match=r"1 GPU of 2 has room for a copy of the model and 80 tokens; --gpus is 2"):
        copies_for(request(gpus=2), 10, 100)


def test_parts_become_one_file_and_none_of_another_identity_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "o[1].jsonl"
    for number, identity in enumerate(("ours", "ours", "another")):
        with Kept(out, identity).adding(number) as adding:
            adding.add({number: said(str(number))})
    with Kept(out, "ours").part(0).open("a") as file:
        file.write('{"7": {"text": "half')
    kept = Kept(out, "ours")
    kept.gather()
    assert {number: own.text for number, own in kept.answers.items()} == {0: "0", 1: "1"}
    assert [path.name for path in tmp_path.iterdir()] == [".o[1].jsonl.unfinished"]
    again = Kept(out, "ours")
    again.read()
    assert again.answers == kept.answers


def test_answers_are_counted_while_other_processes_write_them(tmp_path: Path) -> None:
    kept, counts = Kept(tmp_path / "o.jsonl", "identity"), list[int]()
    watch = _Watch([kept.part(0), kept.part(1)], counts.append)
    watch.look()
    with kept.adding(0) as adding:
        watch.look()
        adding.add({0: said("a")})
        adding.add({1: said("b")})
        watch.look()
        watch.look()
        adding.add({2: said("c")})
        watch.look()
    assert counts == [2, 1]


def test_tokens_a_second_are_those_of_this_command_over_its_slowest_copy() -> None:
    before = {0: said("a", tokens=50, after_s=99)}
    after = before | {1: said("b", tokens=30, after_s=2), 2: said("c", tokens=10, after_s=4)}
    assert str(closing(before, after)) == "3 answers, 40 tokens in 4.0 s, 10.0 tokens/s"
    assert str(closing(before, before)) == "1 answer"


class Told:
    """A process's answer."""

    def __init__(self, answer: Answer | None) -> None:
        self._answer = answer

    def answer(self) -> Answer | None:
        return self._answer


def test_the_error_of_a_copy_is_told_in_its_class_before_that_of_one_that_was_ended_for_it() -> None:
    refused = Answer.refusing(DataError("p:1 is bad", try_="a good one"))
    tasks: Any = [Told(None), Told(refused)]
    with pytest.raises(DataError, match="p:1 is bad"):
        _require_success(tasks, [-children.ENDED_BY, 2])
    tasks = [Told(None), Told(None), Told(Answer())]
    with pytest.raises(JobError, match="a process that was at work was killed by SIGKILL"):
        _require_success(tasks, [-children.ENDED_BY, -9, 0])
    _require_success([Told(Answer())], [0])  # type: ignore[list-item]


def test_programs_side_by_side_end_together_when_one_fails() -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    fails = [sys.executable, "-c", "raise SystemExit(3)"]
    looks: list[int] = []
    found = children.run_together(
        [children.Start(waits, os.environ), children.Start(fails, os.environ)], meanwhile=lambda: looks.append(1)
    )
    assert found == [-children.ENDED_BY, 3]
    assert looks


@pytest.mark.slow
def test_two_copies_write_what_one_does_and_go_on_from_what_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    prompts = tmp_path / "p.txt"
    prompts.write_text("hello\nhello there system assistant user\na\nb c\nd\n")
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    asked = [Generate(run=str(model), prompts=str(prompts), out=str(out), batch=2) for out in files]
    assert generate_file(asked[0], []).answers == 5
    assert generate_file(asked[1], [{}, {}]).answers == 5
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len([json.loads(line)["answer"] for line in files[0].read_text().splitlines()]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one.jsonl", "p.txt", "two.jsonl"]
    err = capfd.readouterr().err
    assert "2 copies of the model, each on a GPU of its own" in err
    assert err.count("5 of 5 answered") == 2
