"""A large data set is tokenized part by part, by several workers, and becomes what one pass gives."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import DataError, JobError
from qdist.core.spec.sections import Data
from qdist.host.data.records import read_conversations
from qdist.host.files import locked
from qdist.runtime.data import parts, token_cache
from qdist.runtime.data.parts import Job, Read, Worker, assemble, parts_of, processes, tokenize_parts, work
from qdist.runtime.data.token_cache import Workers, cached_tokenize
from qdist.runtime.data.tokenized import TokenizedSet, load
from qdist.runtime.data.tokenizing import SampleRules, tokenize, tokenize_sources
from tests.runtime.data.test_tokenized import CHATML, USUAL, tiny_tokenizer

RULES = SampleRules(seq_len=24)


@contextmanager
def threads(count: int, job: Job, sources: Sequence[Read]) -> Iterator[list[Worker]]:
    """Workers without processes, which take their time to start."""
    with ExitStack() as stack:
        workers = []
        for _ in range(count):
            ours, theirs = Pipe()
            thread = threading.Thread(target=work, args=(job, theirs))
            thread.start()
            stack.callback(thread.join)
            stack.callback(ours.close)
            workers.append(Worker(ours, lambda: 0))
        yield workers


@contextmanager
def killed(count: int, job: Job, sources: Sequence[Read]) -> Iterator[list[Worker]]:
    """A worker that does three parts, and then is ended by a signal."""
    ours, theirs = Pipe()

    def three() -> None:
        for _ in range(3):
            number, part = theirs.recv()
            theirs.send(parts._outcome(job, number, part))
        theirs.recv()
        theirs.close()

    thread = threading.Thread(target=three)
    thread.start()
    yield [Worker(ours, lambda: -9)]
    thread.join()


def tokenized_by(
    workers: Workers, source: str, tokenizer: Any, folder: Path, *, count: int = 2
) -> tuple[TokenizedSet, Path]:
    """The set of a file and where it is, by so many workers."""
    data = Data(path=source)
    return cached_tokenize(data, tokenizer, RULES, **USUAL, folder=folder, workers=lambda _, *own: workers(count, *own))


RECORDS: list[dict[str, Any]] = [
    {"input": f"question {number}", "output": "b" * (number % 30), "source": "x"} for number in range(20)
] + [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "long " * 40},
    {"input": "a", "output": "c", "id": 3},
]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(parts, "_MOST_RECORDS", 3)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    return str(path)


def in_one_pass(source: str, tokenizer: Any) -> TokenizedSet:
    return tokenize(read_conversations(source), tokenizer, RULES)


def assert_same(one: TokenizedSet, other: TokenizedSet) -> None:
    assert one.summary == other.summary
    assert one.learned is not None
    assert other.learned is not None
    for name in ("tokens", "labels", "offsets", "learned"):
        mine, yours = getattr(one, name), getattr(other, name)
        assert mine.dtype == yours.dtype
        assert torch.equal(mine, yours), name


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_workers_gives_the_set_and_notes_of_one_pass(
    source: str, tmp_path: Path, template: str | None, count: int
) -> None:
    tokenizer = tiny_tokenizer(template)
    made, path = cached_tokenize(
        Data(path=source),
        tokenizer,
        RULES,
        **USUAL,
        folder=tmp_path / "cache",
        workers=lambda _, *own: threads(count, *own),
    )
    assert_same(made, in_one_pass(source, tokenizer))
    assert len(made.summary.notes) >= 4
    assert list(path.parent.iterdir()) == [path]


def test_processes_count_the_records_and_tokenize_them(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    made, _ = tokenized_by(processes, source, tokenizer, tmp_path, count=2)
    assert_same(made, in_one_pass(source, tokenizer))
    assert "23 of 23 records tokenized" in capsys.readouterr().err


def test_what_a_killed_one_has_done_is_not_done_again(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(JobError, match="a process that tokenized was killed by SIGKILL") as caught:
        tokenized_by(killed, source, tokenizer, tmp_path)
    assert "goes on where it was" in caught.value.try_
    (folder,) = tmp_path.glob("*.parts")
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(done) == 3
    (folder / "count").write_text("23")
    given = list[int]()

    @contextmanager
    def listening(count: int, job: Job, sources: Sequence[Read]) -> Iterator[list[Worker]]:
        assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == done
        with threads(2, job, sources) as workers:
            given.append(len(workers))
            yield workers

    made, _ = tokenized_by(listening, source, tokenizer, tmp_path)
    assert_same(made, in_one_pass(source, tokenizer))
    assert "9 of 23 records were tokenized before" in capsys.readouterr().err


@pytest.mark.parametrize(("days", "held", "stays"), [(6, False, True), (8, False, False), (8, True, True)])
def test_parts_of_a_set_that_was_given_up_are_removed_after_a_week(
    source: str, tmp_path: Path, days: int, held: bool, stays: bool
) -> None:
    abandoned = tmp_path / "other.parts"
    abandoned.mkdir()
    (abandoned / "00000.safetensors").touch()
    with locked(abandoned / "lock") if held else nullcontext():
        then = time.time() - days * 24 * 3600
        os.utime(abandoned, (then, then))
        tokenized_by(threads, source, tiny_tokenizer(), tmp_path)
    assert abandoned.exists() is stays


def test_who_waits_for_parts_that_their_holder_removes_begins_anew(source: str, tmp_path: Path) -> None:
    tokenizer, taken = tiny_tokenizer(), list[int]()

    @contextmanager
    def taken_once(path: Path, *, busy: str = "") -> Iterator[int]:
        with locked(path, busy=busy) as descriptor:
            taken.append(descriptor)
            if len(taken) == 1:  # as whoever held it until now leaves it
                shutil.rmtree(path.parent)
            yield descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "locked", taken_once)
        made, _ = tokenized_by(threads, source, tokenizer, tmp_path)
    assert len(taken) == 2
    assert_same(made, in_one_pass(source, tokenizer))


def test_a_damaged_part_is_told_with_what_to_remove(source: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(JobError):
        tokenized_by(killed, source, tokenizer, tmp_path)
    (folder,) = tmp_path.glob("*.parts")
    part = folder / "00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"00001\.safetensors is damaged"):
        tokenized_by(threads, source, tokenizer, tmp_path, count=1)
    made, _ = tokenized_by(threads, source, tokenizer, tmp_path, count=1)
    assert_same(made, in_one_pass(source, tokenizer))


def test_bad_records_of_all_parts_are_told_together_and_leave_nothing(source: str, tmp_path: Path) -> None:
    lines = Path(source).read_text().splitlines()
    for number in (1, 8, 15, 21):
        lines[number] = "{"
    Path(source).write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        cached_tokenize(
            Data(path=source),
            tiny_tokenizer(),
            RULES,
            **USUAL,
            folder=tmp_path / "cache",
            workers=lambda _, *own: threads(2, *own),
        )
    with pytest.raises(DataError) as alone:
        in_one_pass(source, tiny_tokenizer())
    assert caught.value.message == alone.value.message
    assert "and 1 more" in caught.value.message
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_records_of_all_parts_may_be_left_out(source: str, tmp_path: Path) -> None:
    lines = Path(source).read_text().splitlines()
    for number in (1, 8, 15, 21):
        lines[number] = "{"
    Path(source).write_text("\n".join(lines))
    data, tokenizer = Data(path=source, skip_bad=4), tiny_tokenizer()
    made, _ = cached_tokenize(
        data, tokenizer, RULES, **USUAL, folder=tmp_path, workers=lambda _, *own: threads(2, *own)
    )
    assert_same(made, tokenize_sources([read_conversations(source)], tokenizer, RULES, skip_bad=4))
    assert (made.summary.bad, made.summary.records) == (4, 23)
    with pytest.raises(DataError, match="4 of 23 records cannot be used"):  # though the set is in the cache
        tokenized_by(threads, source, tokenizer, tmp_path)


def test_parts_end_after_many_characters_too(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(parts, "_MOST_CHARACTERS", 100)
    lengths = [len(part.records) for part in parts_of([partial(read_conversations, source)])]
    assert (max(lengths), sum(lengths), lengths[-2]) == (3, 23, 1)


def test_reasoning_counts_among_the_characters_of_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "_MOST_CHARACTERS", 100)
    path = tmp_path / "thoughts.jsonl"
    path.write_text((json.dumps({"input": "a", "output": "b", "reasoning_content": "c" * 98}) + "\n") * 3)
    assert [len(part.records) for part in parts_of([partial(read_conversations, str(path))])] == [1, 1, 1]


def test_several_sources_lie_one_behind_another_and_no_part_is_of_two(source: str, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "set.safetensors", tiny_tokenizer()
    sources: list[Read] = [partial(read_conversations, source), list, partial(read_conversations, source)]
    job = Job(tmp_path / "parts", "k", tokenizer, RULES)
    job.folder.mkdir()
    with threads(2, job, sources) as started:
        count = tokenize_parts(sources, job, started)
    assemble(path, job, count, sources=3, skip_bad=0)
    assert count == 2 * 8
    made = load(path, key="k")
    assert_same(made, tokenize_sources([read() for read in sources], tokenizer, RULES))
    assert made.summary.firsts == (0, len(made) // 2, len(made) // 2)


def test_a_set_that_another_process_made_meanwhile_is_taken(source: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    first, path = tokenized_by(threads, source, tokenizer, tmp_path)
    written = path.stat().st_mtime_ns
    second, again = tokenized_by(killed, source, tokenizer, tmp_path)
    assert (again, again.stat().st_mtime_ns) == (path, written)
    assert_same(first, second)
