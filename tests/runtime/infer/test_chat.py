"""A conversation keeps what was said, prints answers as they come, and obeys commands in one line each."""

import json
import os
import pty
import select
import signal
import stat
import sys
import termios
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.conversation import Wording
from qdist.core.errors import JobError
from qdist.core.sampling import Sampling
from qdist.host.data.records import read_prompts
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.chat import _hear
from qdist.runtime.infer.prompts import Speech
from qdist.runtime.infer.runner import Runner
from qdist.runtime.infer.talk import Talk, Voice
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.infer.scripted import Said, Scripted
from tests.runtime.tiny import save_model

Reply = Callable[[Question], Iterable[Said]]
OWN, BASE = Voice("adapter", "run"), Voice("", "base")


def speech_of(template: str = CHATML) -> Speech:
    return Speech(tiny_tokenizer(template, bos=False), Wording(style="chat", ends=(3,)), 128)


class Seen:
    """A conversation, and what its answerer was asked."""

    def __init__(self, talk: Talk, answerer: Scripted) -> None:
        self.talk, self.answerer = talk, answerer

    def hear(self, *lines: str) -> None:
        for line in lines:
            _hear(self.talk, line)

    def asked(self, number: int = -1) -> str:
        text: str = speech_of().tokenizer.decode(self.answerer.questions[number].prompt)
        return text

    def said(self) -> list[tuple[str, str]]:
        return [(turn.role, turn.text) for turn in self.talk.turns()]


@contextmanager
def talking(reply: Reply, *voices: Voice, speech: Speech | None = None, **more: Any) -> Iterator[Seen]:
    answerer = Scripted(reply)
    settings = {"positions": 128, "system": "", "sampling": Sampling(), "live": False, **more}
    with Runner(answerer) as runner:
        yield Seen(Talk(runner, voices or (OWN,), speech or speech_of(), **settings), answerer)


def hello(_: Question) -> list[Said]:
    return [" hello", " there", ""]


def test_answers_are_printed_as_they_come_and_are_part_of_the_next_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(hello) as seen:
        seen.hear("one", "two")
        assert capsys.readouterr().out == " hello there\n" * 2
        assert seen.said() == [
            ("user", "one"),
            ("assistant", "hello there"),
            ("user", "two"),
            ("assistant", "hello there"),
        ]
        assert "one<|im_end|>" in seen.asked()
        assert "hello there<|im_end|>" in seen.asked()


def test_new_and_clear_forget_and_a_system_message_changes_in_the_middle() -> None:
    with talking(hello, system="be brief") as seen:
        seen.hear("one", "/system be long", "two")
        assert seen.said()[0] == ("system", "be long")
        assert "be long" in seen.asked()
        assert "one" in seen.asked()
        for command in ("/new", "/clear"):
            seen.hear("three", command)
            assert seen.said() == [("system", "be long")]
        seen.hear("/system", "four")
        assert seen.said()[0] == ("user", "four")


def test_a_system_message_that_the_template_refuses_is_told_and_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with talking(hello, speech=speech_of(refusing)) as seen:
        seen.hear("/system be brief", "one")
        assert "no system role" in capsys.readouterr().out
        assert seen.said()[0] == ("user", "one")


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        (["/set temperature warm"], "temperature cannot be 'warm': expected a number; /set temperature"),
        (["/set temprature 1"], "there is no setting temprature; /set temperature"),
        (["/set top-p 2"], "top_p cannot be '2'"),
        (["/set top_p 0.9"], "top_p changes nothing at temperature 0: /set temperature 0.7"),
        (["/regenerate"], "nothing was asked yet"),
        (["hi", "/regenerate"], "at temperature 0 the answer is the same again; /set temperature 0.7"),
        (["/save"], "/save needs the name of a file; /save chat.jsonl"),
        (["/save x.jsonl"], "nothing was said yet"),
        (["/hlep"], "no command /hlep; /help?"),
        (["/zzz"], "no command /zzz; there are /new"),
        (["/help"], "/regenerate       another answer"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    lines: list[str], printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with talking(lambda _: []) as seen:
        seen.hear(*lines)
    out = capsys.readouterr().out.lstrip("\n")
    assert printed in out
    assert out.count("\n") == 1 or "/help" in lines


def test_settings_reach_the_next_answer_and_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(hello) as seen:
        seen.hear("/set temperature 0.5", "/set stop a\\nb", "/set --top-k 7", "hi", "/show")
        sampling = seen.answerer.questions[0].sampling
        assert (sampling.temperature, sampling.stop, sampling.top_k) == (0.5, ("a\nb",), 7)
        shown = capsys.readouterr().out
        assert "temperature        0.5\n" in shown
        assert "stop               'a\\nb'\n" in shown
        assert "2 turns" in shown
        seen.hear("/set stop", "hi")
        assert seen.answerer.questions[1].sampling.stop == ()


def test_another_answer_has_the_next_seed_and_takes_the_place_of_the_last() -> None:
    answers = iter((["one"], ["two"], ["three"], ["four"]))
    with talking(lambda _: next(answers), sampling=Sampling(temperature=1, seed=7)) as seen:
        seen.hear("hi", "/regenerate", "/regenerate", "and")
        assert [question.sampling.seed for question in seen.answerer.questions] == [7, 8, 9, 7]
        assert seen.said() == [("user", "hi"), ("assistant", "three"), ("user", "and"), ("assistant", "four")]


def test_a_saved_conversation_is_data_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.jsonl"
    with talking(hello, system="be brief") as seen:
        seen.hear("grüße", f"/save {path}")
        assert f"3 turns in {path}" in capsys.readouterr().out
        before = path.read_bytes()
        seen.hear(f"/save {path}")
        assert capsys.readouterr().out == f"{path} exists; /save another name\n"
    assert path.read_bytes() == before
    roles = [turn["role"] for turn in json.loads(before)["messages"]]
    assert roles == ["system", "user", "assistant"]


def test_a_conversation_longer_than_the_context_is_told_and_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(hello, positions=40) as seen:
        seen.hear("a" * 60, "hi")
        out = capsys.readouterr().out
        assert "tokens, and the context 40, answer included; /new starts over\n" in out
        assert seen.said() == [("user", "hi"), ("assistant", "hello there")]
        assert seen.answerer.questions[0].sampling.max_new_tokens == 40 - len(seen.answerer.questions[0].prompt)


def test_bytes_that_are_no_text_are_told_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(hello) as seen:
        seen.hear("gr\udcfcn")
        assert seen.said() == []
    assert "half of a character" in capsys.readouterr().out


def test_an_error_of_the_thread_that_answers_ends_the_chat() -> None:
    with talking(lambda _: ["a", JobError("logits are NaN at token 2")]) as seen, pytest.raises(JobError, match="NaN"):
        seen.hear("hi")


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    cancelled = threading.Event()

    class Noticing(Runner):
        def cancel(self, ticket: int) -> None:
            super().cancel(ticket)
            cancelled.set()

    def interrupt() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled.wait(10)
        return ""

    before = signal.getsignal(signal.SIGINT)
    with Noticing(Scripted(lambda _: ["hello", " th", interrupt, "", ""])) as runner:
        talk = Talk(runner, (OWN,), speech_of(), positions=128, system="", sampling=Sampling(), live=False)
        talk.ask("hi")
    assert signal.getsignal(signal.SIGINT) is before
    assert [(turn.role, turn.text) for turn in talk.turns()] == [("user", "hi"), ("assistant", "hello th")]
    assert capsys.readouterr().out == "hello th\n"


def test_base_and_adapter_hear_the_same_questions_and_each_its_own_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(lambda question: ["from ", question.adapter or "base", " end"], BASE, OWN) as seen:
        seen.hear("one", "two")
        assert capsys.readouterr().out == "base:\nfrom base end\nrun:\nfrom adapter end\n" * 2
        assert [question.adapter for question in seen.answerer.questions] == ["", "adapter"] * 2
        assert "from base end" in seen.asked(2)
        assert "from adapter end" in seen.asked(3)
        assert seen.said()[1] == ("assistant", "from adapter end")
        assert seen.answerer.most_working == 2


def test_the_base_ends_where_the_adapter_would() -> None:
    speech = speech_of()._replace(wording=Wording(style="headings", end_text="### Human:"))
    with talking(hello, BASE, OWN, speech=speech) as seen:
        seen.hear("one")
        assert [question.sampling.stop for question in seen.answerer.questions] == [("### Human:",), ()]


class Terminal:
    """A chat on a pseudo terminal."""

    def __init__(self, *options: str, columns: int, **environment: str) -> None:
        pid, self._descriptor = pty.fork()
        if pid == 0:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "qdist", "chat", *options],
                os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"} | environment,
            )
        self._pid, self.shown, self._seen = pid, "", 0
        termios.tcsetwinsize(self._descriptor, (24, columns))

    def until(self, text: str, timeout_s: float = 120) -> None:
        """Wait for a text after the one that was waited for before."""
        while text not in self.shown[self._seen :]:
            assert select.select([self._descriptor], [], [], timeout_s)[0], (
                f"{text!r} did not come; there is {self.shown!r}"
            )
            self.shown += os.read(self._descriptor, 65536).decode(errors="replace")
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def end(self) -> int:
        """The exit code, when all output was read."""
        try:
            while more := os.read(self._descriptor, 65536):
                self.shown += more.decode(errors="replace")
        except OSError:  # Linux's end of a pseudo terminal
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_on_a_terminal_lines_are_edited_kept_for_the_next_chat_and_answers_counted(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    cache = tmp_path / "cache"
    history = cache / "chat_history"
    cache.mkdir()
    history.write_text("an older line\n")
    terminal = Terminal(str(model), "--max-new-tokens", "4", columns=80, QDIST_CACHE=str(cache))
    terminal.until("> ")
    terminal.type("helo\x1b[Dl\n")  # a cursor key: what is typed goes before the last letter
    terminal.until("the first after")
    terminal.until("> ")
    terminal.type("one \\\ntwo\n")
    terminal.until("the first after")
    terminal.type('/show\n"""a\nb"""\n')
    terminal.until("4 turns")
    terminal.until("the first after")
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x15/quit\n")
    assert terminal.end() == 0, terminal.shown
    lines = history.read_text().splitlines()
    assert lines == ["an older line", "hello", "one \\", "two", "/show", '"""a', 'b"""', "/quit"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "\x1b[2m" in terminal.shown


def test_prompts_are_read_back_from_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with talking(hello) as seen:
        seen.hear("one", f"/save {path}")
    record = json.loads(path.read_text())
    record["messages"] = record["messages"][:-1]
    path.write_text(json.dumps(record))
    assert read_prompts(path)[0].turns[0].said == "one"
