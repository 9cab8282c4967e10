"""A conversation with one or two voices of a model: what was said, how answers are chosen, what commands change."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from qdist.core.composed import resampled, unescaped
from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError, RunError, SpecError, flag_of, nearest
from qdist.core.sampling import Sampling
from qdist.core.spec.keys import description, json_text
from qdist.host.files import file_to_write, unwritable
from qdist.host.terminal import say
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.answering import ended_alike
from qdist.runtime.infer.hearing import Hearing, shown_as
from qdist.runtime.infer.prompts import Speech, encode_prompts
from qdist.runtime.infer.runner import Runner

COMMANDS: Mapping[str, tuple[str, str]] = {
    "/new": ("", "start over"),
    "/clear": ("", "the same"),
    "/system": ("TEXT", "another system message; none without a text"),
    "/set": ("NAME VALUE", "change how tokens are chosen, such as /set temperature 0.7"),
    "/show": ("", "what is set, and how long the conversation is"),
    "/regenerate": ("", "another answer to the last message, with the next seed"),
    "/save": ("FILE", "write the conversation as data that qdist launch takes"),
    "/help": ("", "show this"),
    "/quit": ("", "leave"),
    "/exit": ("", "the same"),
}
"""What each command takes and does."""
_SETTINGS = [field.name for field in msgspec.structs.fields(Sampling) if description(Sampling, field.name)]
"""What `/set` changes."""


class Voice(NamedTuple):
    """One that answers."""

    adapter: str
    """Its name in the answerer; empty for the base."""
    label: str


class Talk:
    """A conversation. Voices hear the same questions, and each its own answers."""

    def __init__(
        self, runner: Runner, voices: Sequence[Voice], speech: Speech, *, positions: int, system: str,
        sampling: Sampling, live: bool,
    ) -> None:  # fmt: skip
        """positions: tokens of the conversation, at most. live: output is a terminal."""
        self._runner, self._voices, self._speech, self._live = runner, voices, speech, live
        self._positions, self._system, self._sampling = positions, system, sampling
        self._turns: list[tuple[Turn, ...]] = [() for _ in voices]
        self._drawn_again = self._held = 0

    def commands(self) -> Mapping[str, Callable[[str], None]]:
        """What each command does with what is typed behind it."""
        return {
            "/new": self._forget, "/clear": self._forget, "/system": self._set_system, "/set": self._set,
            "/show": self._show, "/regenerate": self._regenerate, "/save": self._save,
        }  # fmt: skip

    def ask(self, text: str) -> None:
        """Say something, and print the answers as they come."""
        self._drawn_again = 0
        self._exchange([(*turns, Turn("user", text, False)) for turns in self._turns])

    def turns(self, voice: int = -1) -> tuple[Turn, ...]:
        """What was said, the system message first."""
        opening = (Turn("system", self._system, False),) if self._system else ()
        return (*opening, *self._turns[voice])

    def _exchange(self, asked: Sequence[tuple[Turn, ...]]) -> None:
        """Have the last turns answered; the question is forgotten if it cannot be."""
        before, self._turns = self._turns, list(asked)
        try:
            questions = [self._question(number) for number in range(len(self._voices))]
        except DataError as error:
            self._turns = before
            say(f"{error.message}; /new starts over")
            return
        labels = [voice.label for voice in self._voices]
        hearing = Hearing(self._runner, questions, shown_as(labels, live=self._live))
        answers = [Turn("assistant", text.strip(), False) for text in hearing.answers()]
        self._turns = [(*turns, answer) for turns, answer in zip(asked, answers, strict=True)]
        self._held = hearing.held
        if self._live:
            say(hearing.summary(self._positions), dim=True)

    def _question(self, number: int) -> Question:
        """What a voice is asked. Raises DataError if the conversation is too long, or the template refuses it."""
        prompt = encoded(self.turns(number), self._speech, where="the conversation")
        room = self._positions - len(prompt)
        if room <= 0:
            told = f"the conversation has {len(prompt):,} tokens, and the context {self._positions:,}, answer included"
            raise DataError(told, try_="qdist chat with a larger --context")
        sampling = self._sampling.again(self._drawn_again)
        sampling = msgspec.structs.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        adapter = self._voices[number].adapter
        return Question(prompt, ended_alike(sampling, self._speech, adapter), adapter)

    def _forget(self, _: str) -> None:
        self._turns, self._held = [() for _ in self._voices], 0

    def _set_system(self, text: str) -> None:
        if text:
            encoded((Turn("system", text, False), Turn("user", "?", False)), self._speech, where="/system")
        self._system = text

    def _set(self, given: str) -> None:
        name, _, value = given.partition(" ")
        name, value = name.lstrip("-").replace("-", "_"), value.strip()
        if not given:
            self._show("")
            return
        if name not in _SETTINGS:
            close = nearest(name, _SETTINGS)
            raise SpecError(f"there is no setting {name}", try_=f"/set {close}" if close else ", ".join(_SETTINGS))
        if name == "stop":
            self._sampling = resampled(self._sampling, {name: (unescaped(value),) if value else ()})
            return
        try:
            self._sampling = resampled(self._sampling, {name: value})
        except SpecError as error:
            raise SpecError(error.message, try_=error.try_.replace(f"{flag_of(name)} ", f"/set {name} ")) from None
        if self._sampling.is_greedy and name in ("top_p", "top_k", "min_p", "seed"):
            say(f"{name} changes nothing at temperature 0: /set temperature 0.7")

    def _show(self, _: str) -> None:
        shown = {name: getattr(self._sampling, name) for name in _SETTINGS}
        for name, value in shown.items():
            say(f"{name:18} {', '.join(map(repr, value)) if isinstance(value, tuple) else json_text(value)}")
        say(f"{'system':18} {self._system}")
        say(f"{'conversation':18} {len(self._turns[-1])} turns, {self._held:,} of {self._positions:,} tokens")

    def _regenerate(self, _: str) -> None:
        if not self._turns[-1]:
            raise SpecError("nothing was asked yet")
        if self._sampling.is_greedy:
            raise SpecError("at temperature 0 the answer is the same again", try_="/set temperature 0.7")
        self._drawn_again += 1
        self._exchange([turns[:-1] for turns in self._turns])

    def _save(self, given: str) -> None:
        if not given:
            raise SpecError("/save needs the name of a file", try_="/save chat.jsonl")
        if not self._turns[-1]:
            raise SpecError("nothing was said yet")
        try:
            path = Path(file_to_write(str(Path(given).expanduser())))
        except RunError as error:
            raise RunError(error.message, try_="/save another name") from None
        messages = [{"role": turn.role, "content": turn.said} for turn in self.turns()]
        with unwritable(path), path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        whose = f" with the answers of {self._voices[-1].label}" if len(self._voices) > 1 else ""
        say(f"{len(messages)} turns in {path}{whose}")


def encoded(turns: Sequence[Turn], speech: Speech, *, where: str) -> list[int]:
    """The tokens of a conversation up to its next answer. Raises DataError as `encode_prompts` does."""
    return encode_prompts([Conversation(turns=tuple(turns), where=where)], speech)[0]
