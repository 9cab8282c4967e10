"""How do several processes tokenize a large data set in bounded memory, so that a killed one goes on?

FOLDER/00000.safetensors    the samples of the first records, and what is counted of them
FOLDER/count                how many records there are, once that is known
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import accumulate, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import safe_open

from qdist.core.data.conversation import Conversation
from qdist.core.errors import DataError, JobError, QdistError
from qdist.core.text import quoted
from qdist.host.children import killed_by
from qdist.host.files import write_atomic
from qdist.host.progress import ProgressLine
from qdist.host.terminal import say
from qdist.runtime.data.tokenized import metadata_of, publish, read_arrays
from qdist.runtime.data.tokenizing import SampleRules, Sizes, Tally, read_part, summary
from qdist.runtime.formats.streamed import Stream, stream_of

Found = Conversation | DataError
Read = Callable[[], Iterable[Found]]
"""Reads the records from the first; picklable."""
_MOST_RECORDS, _MOST_CHARACTERS = 1 << 12, 1 << 22
"""Records and characters after which a part ends: a million tokens or so, which take a process some four seconds."""
_FEW = 4
"""Parts that one process has tokenized by the time that others have started."""
_AGAIN = "the same command again, which goes on where it was"


class Job(NamedTuple):
    """What every part needs."""

    folder: Path
    key: str
    tokenizer: Any
    rules: SampleRules

    def file(self, number: int) -> Path:
        """Where a part is."""
        return self.folder / f"{number:05d}.safetensors"


class Part(NamedTuple):
    """Some records of a source."""

    source: int
    """Which of the sources."""
    records: list[Found]


def parts_of(sources: Sequence[Read]) -> Iterator[Part]:
    """The records of all sources in parts that depend on nothing but the records; none is of two sources."""
    for number, read in enumerate(sources):
        records, characters = list[Found](), 0
        for each in read():
            records.append(each)
            if isinstance(each, Conversation):
                characters += sum(len(turn.said) + len(turn.thoughts) for turn in each.turns)
            if len(records) >= _MOST_RECORDS or characters >= _MOST_CHARACTERS:
                yield Part(number, records)
                records, characters = [], 0
        if records:
            yield Part(number, records)


def few_or_more(sources: Sequence[Read]) -> list[list[Found]] | None:
    """The records of each source, if they are so few that one process is as fast; else None."""
    few = list(islice(parts_of(sources), _FEW + 1))
    if len(few) > _FEW:
        return None
    return [[each for part in few if part.source == number for each in part.records] for number in range(len(sources))]


def tokenize_parts(sources: Sequence[Read], job: Job, started: Sequence["Worker"]) -> int:
    """Have each part tokenized that is not there yet, in any order; returns how many parts there are.

    Raises the QdistError that one of the workers finds, JobError if one is killed.
    """
    before, total = sum(map(_records_in, sorted(job.folder.glob("*.safetensors")))), _known_count(job)
    if before:
        of = f" of {total:,}" if total else ""
        say(f"{before:,}{of} records were tokenized before", err=True)
    number, records = -1, 0
    with ProgressLine(total, "records tokenized", done=before) as progress:
        team = _Team(job, started, progress)
        for number, part in enumerate(parts_of(sources)):
            records += len(part.records)
            if not job.file(number).is_file():
                team.give(number, part)
        progress.expect(records)
        team.finish()
    return number + 1


class Worker(NamedTuple):
    """A process that tokenizes the parts that it is sent, and answers each with None or an error."""

    pipe: Connection
    exit_code: Callable[[], int | None]
    """Waits for its end."""


class _Team:
    """Hands parts to whoever is free."""

    def __init__(self, job: Job, workers: Sequence[Worker], progress: ProgressLine) -> None:
        self._job, self._progress = job, progress
        self._free, self._busy = list(workers), dict[Connection, tuple[Worker, int]]()

    def give(self, number: int, part: Part) -> None:
        """Have a part tokenized once a worker is free."""
        if not self._free:
            self._hear()
        worker = self._free.pop()
        with suppress(BrokenPipeError):  # what ended it is told as its answer is waited for
            worker.pipe.send((number, part))
        self._busy[worker.pipe] = (worker, len(part.records))

    def finish(self) -> None:
        """Wait for all parts."""
        while self._busy:
            self._hear()

    def _hear(self) -> None:
        for pipe in wait(list(self._busy)):
            assert isinstance(pipe, Connection)
            worker, records = self._busy.pop(pipe)
            _require_done(worker)
            self._free.append(worker)
            if total := _known_count(self._job):
                self._progress.expect(total)
            self._progress.advance(records)


def _require_done(worker: Worker) -> None:
    try:
        error = worker.pipe.recv()
    except EOFError:
        code = worker.exit_code() or 0
        how = killed_by(-code) if code < 0 else f"ended with exit code {code}"
        raise JobError(f"a process that tokenized {how}", try_=_AGAIN) from None
    if error is not None:
        raise error


@contextmanager
def processes(count: int, job: Job, sources: Sequence[Read]) -> Iterator[list[Worker]]:
    """Workers in processes of their own, and another one that counts the records; they end with this process.

    They come from a server that is forked before it has threads: tokenizers' and OpenMP's would not survive a fork.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        workers = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work_alone, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(_end, process)
            stack.callback(ours.close)
            workers.append(Worker(ours, partial(_exit_code, process)))
        if not _known_count(job):
            counting = context.Process(target=_count, args=(job, sources), daemon=True)
            counting.start()
            stack.callback(_end, counting)
        yield workers


def _end(process: BaseProcess) -> None:
    process.terminate()
    process.join()


def _exit_code(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def _work_alone(job: Job, pipe: Connection) -> None:
    """`work` as a process that Ctrl-C leaves to its parent, and that uses one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work(job, pipe)


def work(job: Job, pipe: Connection) -> None:
    """Tokenize the parts that come through a pipe, until it is closed."""
    with suppress(EOFError, BrokenPipeError):
        while True:
            number, part = pipe.recv()
            pipe.send(_outcome(job, number, part))


def _outcome(job: Job, number: int, part: Part) -> QdistError | None:
    """What the user can put right, if a part cannot be tokenized."""
    try:
        _tokenize_part(job, number, part)
    except QdistError as error:
        return error
    return None


def _tokenize_part(job: Job, number: int, part: Part) -> None:
    samples, tally = read_part(part.records, job.tokenizer, job.rules)
    counted = torch.frombuffer(bytearray(msgspec.msgpack.encode(tally)), dtype=torch.uint8)
    streams = {name: stream_of(own) for name, own in (samples.arrays() | {"tally": counted}).items()}
    publish(job.file(number), streams, {"key": job.key, "records": str(tally.records), "source": str(part.source)})


def _records_in(file: Path) -> int:
    """The records of a part."""
    return int(metadata_of(file)["records"])


def _count(job: Job, sources: Sequence[Read]) -> None:
    """Write how many records there are."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(DataError):  # which the parent finds as well
        write_atomic(job.folder / "count", str(sum(1 for read in sources for _ in read())))


def _known_count(job: Job) -> int:
    """How many records there are; 0 if that is not known yet."""
    file = job.folder / "count"
    return int(file.read_text()) if file.is_file() else 0


def assemble(path: Path, job: Job, count: int, *, sources: int, skip_bad: int) -> None:
    """Write the whole set of `count` parts, of which one at a time is in memory.

    sources: how many there are. skip_bad: as for `tokenize_sources`.

    Raises DataError when nothing is left at all, and once for all records that cannot be used.
    """
    files, tally, tokens, samples = [job.file(number) for number in range(count)], Tally(), 0, [0] * sources
    for file in files:
        metadata, arrays = read_arrays(file, try_=quoted("rm", "-r", job.folder))
        tally.extend(msgspec.msgpack.decode(arrays["tally"].numpy().tobytes(), type=Tally))
        samples[int(metadata["source"])] += arrays["lengths"].numel()
        tokens += arrays["tokens"].numel()
    *firsts, total = accumulate(samples, initial=0)
    told = summary(tally, job.tokenizer, job.rules, firsts=firsts, sizes=Sizes(total, tokens), skip_bad=skip_bad)
    streams = {
        name: Stream(torch.int32, number, partial(_each, files, name))
        for name, number in (("tokens", tokens), ("labels", tokens), ("learned", total))
    }
    streams["offsets"] = Stream(torch.int64, total + 1, partial(_offsets, files))
    publish(path, streams, {"key": job.key, "summary": msgspec.json.encode(told).decode()})


def _each(files: Sequence[Path], name: str) -> Iterator[torch.Tensor]:
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield stored.get_tensor(name)


def _offsets(files: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Where samples end, behind the 0 where the first begins."""
    last = torch.zeros(1, dtype=torch.int64)
    yield last
    for lengths in _each(files, "lengths"):
        if lengths.numel():
            ends = lengths.cumsum(0) + last
            yield ends
            last = ends[-1:]
