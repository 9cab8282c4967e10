"""Chat with a model on a terminal; answers are streamed."""

import signal
import sys

from qdist.core.data.conversation import Turn
from qdist.core.errors import JobError, QdistError, nearest
from qdist.core.requests import Chat
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say
from qdist.host.typed import Typed
from qdist.runtime.infer.answering import adapter_of
from qdist.runtime.infer.prompts import speech_of
from qdist.runtime.infer.ready import open_answerer
from qdist.runtime.infer.runner import Runner
from qdist.runtime.infer.talk import COMMANDS, Talk, Voice, encoded
from qdist.runtime.quantize.materialize import trust

_HELP = "\n".join((
    *(f"{name + ' ' + given:17} {what}" for name, (given, what) in COMMANDS.items()),
    "A line that ends with \\ goes on in the next; \"\"\" begins and ends a message of several lines.",
    "Ctrl-C ends an answer and keeps what was said; at the prompt it leaves, as an empty line does.",
))  # fmt: skip


def run(request: Chat) -> None:
    """Chat until the user leaves. `/quit`, an empty line or end of input leaves; Ctrl-C ends an answer.

    Raises DataError, before weights are read, for a system message that the chat template refuses.
    """
    if request.trust_remote_code:
        trust(request.run)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent leaves Ctrl-C to us, and we inherit that
    speech = speech_of(request.run)
    if request.system:
        encoded((Turn("system", request.system, False), Turn("user", "?", False)), speech, where="--system")
    name = adapter_of(request.run)
    voices = [Voice(name, RunDir(request.run).path.name or request.run)]
    if request.compare:
        voices.insert(0, Voice("", "base"))
    ready = open_answerer(
        {name: request.run}, slots=len(voices), tokens=min(request.context, speech.positions or request.context),
        engine=request.engine, max_memory_bytes=request.max_memory_bytes, dtype=request.dtype,
        ahead=(request.sampling,),
    )  # fmt: skip
    for line in filter(None, (ready.where, speech.note)):
        say(line, err=True)
    say("type a message; /help tells the commands, an empty line leaves")
    with Runner(ready.answerer) as runner, Typed() as typed:
        talk = Talk(runner, voices, speech, positions=ready.answerer.positions, system=request.system,
                    sampling=request.sampling, live=sys.stdout.isatty())  # fmt: skip
        while (text := typed.message()) not in (None, "", "/quit", "/exit"):
            _hear(talk, text or "")


def _hear(talk: Talk, text: str) -> None:
    """Answer a message, or obey a command; what cannot be done is told in a line."""
    if not text.startswith("/"):
        talk.ask(text)
        return
    word, _, rest = text.partition(" ")
    command = talk.commands().get(word)
    if command is None:
        say(_HELP if word == "/help" else _unknown(word))
        return
    try:
        command(rest.strip())
    except JobError:
        raise
    except QdistError as error:
        say("; ".join(filter(None, (error.message, error.try_))))


def _unknown(word: str) -> str:
    close = nearest(word, COMMANDS)
    return f"no command {word}; " + (f"{close}?" if close else f"there are {', '.join(COMMANDS)}")
