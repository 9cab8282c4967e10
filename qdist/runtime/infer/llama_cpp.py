"""Answers with llama.cpp, of the package xllamacpp: on CPUs, from GGUF files."""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from qdist.core.errors import DataError, JobError, MachineError, ModelError
from qdist.core.model.storage import GgufType
from qdist.core.requests import Export
from qdist.core.sampling import Sampling
from qdist.core.text import counted
from qdist.host.files import cache_dir, locked
from qdist.host.opening import told
from qdist.host.run.rundir import RunDir
from qdist.host.sources.cache import exported_file
from qdist.host.sources.gguf_header import read_config, read_header
from qdist.host.sources.models import locate
from qdist.host.tasks import run_task
from qdist.host.terminal import say
from qdist.runtime.data.wording import usual_wording
from qdist.runtime.infer.answerer import Listener, Question
from qdist.runtime.infer.choosing import Choice
from qdist.runtime.infer.decoding import as_written
from qdist.runtime.infer.line import Answer, AtLine, Line
from qdist.runtime.infer.prompts import Speech, speech_of
from qdist.runtime.infer.ready import Ready
from qdist.runtime.infer.text import Script

_TYPE: GgufType = "q8_0"
"""Type of the file that is made of a run: SmolLM2's likeliest token is transformers' in 95 % of places, with q4_k_m in
86 %."""
_PATIENCE_S = 0.05
"""Seconds that a step waits for the next token of any answer before its caller may submit and cancel again."""
_RANDOM_SEED = 2**32 - 1
"""The seed by which llama.cpp draws another one."""


def open_llama_cpp(targets: Mapping[str, str], *, slots: int, tokens: int) -> Ready:
    """An answerer over llama.cpp. A run's merged model is written to a GGUF file in the cache, once.

    targets: runs or GGUF models by the names of their adapters; each is a model of its own in memory. slots, tokens: as
    of `open_answerer`; a slot's keys and values are allocated at once.

    Raises MachineError without xllamacpp, ModelError for models that are neither run nor GGUF, or that llama.cpp cannot
    read.
    """
    library = import_llama_cpp()
    files = {name: gguf_of(target) for name, target in targets.items()}
    speeches = {name: _speech(targets[name], file) for name, file in files.items()}
    positions = min(tokens, *(speech.positions or tokens for speech in speeches.values()))
    threads = len(os.sched_getaffinity(0))
    servers = {
        name: start_server(library, file, slots=slots, positions=positions, threads=threads)
        for name, file in files.items()
    }
    scripts = {name: _script(speech, files[name]) for name, speech in speeches.items()}
    first = next(iter(files))
    if not RunDir(targets[first]).exists():  # a model's own name and the base's mean the same
        servers[""], scripts[""], speeches[""] = servers[first], scripts[first], speeches[first]
    answerer = LlamaCpp(servers, scripts, slots=slots, positions=positions)
    where = f"llama.cpp on {counted(threads, 'CPU thread')}, {', '.join(file.name for file in files.values())}"
    return Ready(answerer, speeches, where)


def import_llama_cpp() -> Any:
    """The module xllamacpp. Raises MachineError where it is not installed."""
    try:
        return import_module("xllamacpp")
    except ImportError as error:
        raise MachineError(f"llama.cpp cannot be imported: {error}", try_="pip install 'qdist[llamacpp]'") from None


def gguf_of(target: str) -> Path:
    """The GGUF file of a run, which is made if it is not in the cache, or of a model that is one.

    Raises ModelError for other models.
    """
    run = RunDir(target)
    if run.exists():
        return _of_run(run)
    located = locate(target)
    if located.kind != "gguf":
        raise ModelError(f"{target} is neither a run nor a GGUF file, which llama.cpp reads", try_="--engine qdist")
    return Path(located.path)


def _of_run(run: RunDir) -> Path:
    file = exported_file(run, _TYPE)
    if not file.is_file():
        cache_dir(file.parent.name)
        with locked(file.with_name(f".{file.name}.lock")):
            if not file.is_file():
                say(f"writing the merged model for llama.cpp as {_TYPE}, once: the result is cached", err=True)
                run_task(Export(to="gguf", runs=(str(run.path),), out=str(file), type=_TYPE, cached=True))
    return file


def _speech(target: str, file: Path) -> Speech:
    """How to prompt a run, or a GGUF file: its tokenizer is read without its weights, whose types may be any."""
    if RunDir(target).exists():
        return speech_of(target)
    from transformers import AutoTokenizer

    with told(str(file), ModelError, try_="a GGUF file with a vocabulary"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    for name, token in _special_tokens(file).items():  # transformers 5.17 takes other tokens for them
        setattr(tokenizer, f"{name}_id", token)
    return Speech(tokenizer, usual_wording(tokenizer), read_config(file).get("max_position_embeddings"))


def _special_tokens(file: Path) -> dict[str, int]:
    """The file's own ids of the tokens that begin and end texts."""
    said = read_header(file).metadata
    keys = {name: f"tokenizer.ggml.{name}_id" for name in ("bos_token", "eos_token")}
    return {name: int(said[key]) for name, key in keys.items() if key in said}


def _script(speech: Speech, file: Path) -> Script:
    """What ends answers: as in training, and what the file says; llama.cpp ends them there whatever is asked."""
    said = read_header(file).metadata
    keys = ("eos", "eot", "eom")
    own = {int(said[key]) for name in keys if (key := f"tokenizer.ggml.{name}_token_id") in said}
    return Script(speech.tokenizer, own | {*speech.wording.ends}, speech.wording.end_text)


def start_server(library: Any, file: Path, *, slots: int, positions: int, threads: int) -> Any:
    """llama.cpp's server over a file. It listens on a port of this machine, behind a key that nobody is told.

    Raises ModelError for a file that it cannot read.
    """
    params = library.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = str(file), slots, slots * positions
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.fit_params, params.cache_ram_mib, params.verbosity = 0, False, 0, -1
    params.warmup = False
    params.api_keys = [secrets.token_hex(32)]
    try:
        server = library.Server(params)
    except RuntimeError as error:
        raise ModelError(f"llama.cpp cannot read {file}: {error}", try_="--engine qdist") from error
    # A server that is ended before its loop has begun waits for it for ever (xllamacpp 2026.10).
    server.handle_completions({"prompt": [0], "n_predict": 1}, lambda _: False)
    return server


class _Heard(NamedTuple):
    """Something that llama.cpp said of an answer."""

    ticket: int
    said: Mapping[str, Any]
    """A piece in OpenAI's form, or an error."""


class _Course(NamedTuple):
    """An answer at work."""

    answer: Answer
    asking: Future[None]


class LlamaCpp(AtLine):
    """An `Answerer` over llama.cpp's servers, one a model: its own threads compute, and `step` tells what they say.

    What is drawn is a function of the seed as well, but not the same that qdist draws. Of several tokens that make one
    character only the last has log-probabilities; the others' are told as 0.
    """

    def __init__(
        self, servers: Mapping[str, Any], scripts: Mapping[str, Script], *, slots: int, positions: int
    ) -> None:
        """servers, scripts: by the names of their adapters. slots: answers at a time, of all models together."""
        super().__init__(Line(scripts, positions), slots)
        self._servers, self._scripts = servers, scripts
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="llama.cpp")
        self._heard = SimpleQueue[_Heard]()
        self._at_work = dict[int, _Course]()

    @property
    def working(self) -> int:
        """Answers at work."""
        return len(self._at_work)

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question into the line; see `Answerer`. Raises DataError for settings that llama.cpp has otherwise."""
        sampling = question.sampling
        if not question.adapter and "" not in self._servers:
            raise DataError(
                "llama.cpp has the adapter merged into the model, not the base beside it", try_="--engine qdist"
            )
        if sampling.presence_penalty or sampling.frequency_penalty:
            raise DataError(
                "llama.cpp takes presence and frequency penalties for tokens of the prompt, too", try_="--engine qdist"
            )
        return self.line.submit(question, listener)

    def cancel(self, ticket: int) -> None:
        """End an answer; see `Answerer`. llama.cpp hears of it at its next token."""
        self.line.cancel(ticket)
        self._at_work.pop(ticket, None)

    def step(self) -> bool:
        """Let in whom there is a slot for, and tell what llama.cpp has said since; see `Answerer`."""
        for answer in self.line.admit(self.slots - len(self._at_work)):
            self._at_work[answer.ticket] = _Course(answer, self._pool.submit(self._ask, answer))
        if not self._at_work:
            return False
        news = self._news()
        for heard in news:
            if heard.ticket in self._at_work:
                self._tell(self._at_work[heard.ticket].answer, heard.said)
        for course in tuple(self._at_work.values()) if not news else ():
            if course.asking.done():
                course.asking.result()  # raises what ended it
        return True

    def _ask(self, answer: Answer) -> None:
        """Have an answer written, on a thread of the pool. llama.cpp calls back on this thread."""
        question = answer.question

        def hear(said: Mapping[str, Any]) -> bool:
            self._heard.put(_Heard(answer.ticket, said))
            return answer.ended

        if not answer.ended:
            most = min(question.sampling.max_new_tokens, self.positions - len(question.prompt))
            asked = {**asked_of(question.sampling, self.positions), "prompt": list(question.prompt), "n_predict": most}
            self._servers[question.adapter].handle_completions(asked, hear)

    def _news(self) -> Sequence[_Heard]:
        """What was said since, after a moment's wait for the first of it."""
        try:
            news = [self._heard.get(timeout=_PATIENCE_S)]
        except Empty:
            return ()
        while not self._heard.empty():
            news.append(self._heard.get())
        return news

    def _tell(self, answer: Answer, said: Mapping[str, Any]) -> None:
        if "error" in said:
            answer.fail(JobError(f"llama.cpp cannot go on: {said['error'].get('message')}", try_="--engine qdist"))
        else:
            (piece,) = said["choices"]
            for choice in choices_of(piece, self._scripts[answer.question.adapter].tokenizer):
                answer.take(choice)
            if piece["finish_reason"]:
                answer.end("length" if piece["finish_reason"] == "length" else "stop")
        if answer.ended:
            self.line.forget(answer)
            self._at_work.pop(answer.ticket, None)


def asked_of(sampling: Sampling, positions: int) -> dict[str, Any]:
    """What chooses the tokens of an answer, as llama.cpp's server is told. Stop texts are looked for by `Answer`."""
    return {
        "stream": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": positions,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "seed": sampling.seed % _RANDOM_SEED,
        "n_probs": max(1, sampling.logprobs),  # without any, tokens are told as text alone
        "ignore_eos": sampling.ignore_end,
    }


def choices_of(piece: Mapping[str, Any], tokenizer: Any) -> list[Choice]:
    """The tokens of a piece: of a character in several, llama.cpp's server says the last one and the text of all."""
    found = list[Choice]()
    for each in (piece["logprobs"] or {}).get("content") or ():
        token, logprob = each["id"], each["logprob"]
        likely = tuple((other["id"], other["logprob"]) for other in each["top_logprobs"])
        is_finite = logprob is not None and math.isfinite(logprob)
        found += [Choice(earlier, is_finite) for earlier in _tokens_before(token, piece["text"], tokenizer)]
        found.append(Choice(token, is_finite, logprob or 0.0, likely))
    return found


def _tokens_before(token: int, text: str, tokenizer: Any) -> list[int]:
    """The tokens in front of one that is the end of a character: those that the tokenizer would take for the text."""
    if as_written(tokenizer, [token]) == text or text.isascii():
        return []
    whole = tokenizer.encode(text, add_special_tokens=False)
    counts = (count for count in range(1, len(whole) + 1) if as_written(tokenizer, whole[-count:]) == text)
    shortest = next(counts, 0)
    return list(whole[-shortest:-1]) if shortest and whole[-1] == token else []
