"""Which tokenized set belongs to some data, and where is it kept so that no later run tokenizes it again?"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.data.reading import Reading
from qdist.core.data.records import check_format
from qdist.core.errors import DataError, RunError
from qdist.core.spec.sections import Data
from qdist.host.data.records import reading_for, source_digest
from qdist.host.data.sources import read_source, sources_of
from qdist.host.files import locked
from qdist.runtime.data.parts import Job, Read, Worker, assemble, few_or_more, processes, tokenize_parts
from qdist.runtime.data.tokenized import TokenizedSet, load, save
from qdist.runtime.data.tokenizing import SampleRules, tokenize_sources

_VERSION = 5
"""Increment whenever the same records would give other tokens or labels, or their parts would end elsewhere."""

_KEPT_S = 7 * 24 * 3600
"""Seconds that the parts of a set are kept after the last of them was written."""
_LOCK = "lock"

Workers = Callable[[int, Job, Sequence[Read]], AbstractContextManager[list[Worker]]]


def cached_tokenize(
    data: Data,
    tokenizer: Any,
    rules: SampleRules,
    *,
    reading: Reading,
    seed: int,
    folder: Path,
    workers: Workers = processes,
) -> tuple[TokenizedSet, Path]:
    """The tokenized set of all sources of a run, one behind another, and its file in `folder`, written if missing.

    seed: chooses the records of sources with a count.
    folder: where sets are kept, each under its key; ranks may race for it, the files are equal.
    workers: who tokenizes a large one, part by part. The parts are kept beside the set until it is whole, or found to
    be of no use, so that a killed process is gone on from; those of a set that was given up are removed after a week.
    """
    if reading.format is not None:
        check_format(reading.format)
    key = cache_key(data, tokenizer, rules, reading=reading, seed=seed)
    path = folder / f"{key}.safetensors"
    if found := _known(path, key, data.skip_bad):
        return found, path
    sweep_parts(folder)
    sources = [partial(read_source, source, reading, seed=seed) for source in sources_of(data)]
    job = Job(folder / f"{key}.parts", key, tokenizer, rules)
    few = None if job.folder.is_dir() else few_or_more(sources)
    if few is not None:
        tokenized = tokenize_sources(few, tokenizer, rules, skip_bad=data.skip_bad)
        save(tokenized, path, key=key)
        return tokenized, path
    _tokenize_in_parts(path, job, sources, workers, skip_bad=data.skip_bad)
    return load(path, key=key), path


def _known(path: Path, key: str, skip_bad: int) -> TokenizedSet | None:
    """The set that is there, unless more records were left out than now may be."""
    found = load(path, key=key) if path.is_file() else None
    return found if found is not None and found.summary.bad <= skip_bad else None


def _tokenize_in_parts(path: Path, job: Job, sources: Sequence[Read], workers: Workers, *, skip_bad: int) -> None:
    """Write a large set, unless another process has done so by the time that this one may."""
    with _holding(job.folder):
        if _known(path, job.key, skip_bad):
            return
        try:
            with workers(len(os.sched_getaffinity(0)), job, sources) as started:
                count = tokenize_parts(sources, job, started)
            assemble(path, job, count, sources=len(sources), skip_bad=skip_bad)
        except DataError:
            shutil.rmtree(job.folder)
            raise
        shutil.rmtree(job.folder)


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Hold a folder of parts, made if missing, while the block runs; waits for whoever holds it."""
    with ExitStack() as stack:
        while not _is_held(folder, stack):
            pass
        yield


def _is_held(folder: Path, stack: ExitStack) -> bool:
    """Lock a folder; false if whoever held it before has removed it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / _LOCK
    try:
        return os.path.samestat(os.fstat(stack.enter_context(locked(lock))), lock.stat())
    except FileNotFoundError:
        return False


def sweep_parts(folder: Path) -> None:
    """Remove the parts of sets that nobody has tokenized for a week, unless a process holds them."""
    oldest = time.time() - _KEPT_S
    for parts in folder.glob("*.parts"):
        with suppress(OSError, RunError):  # held, removed by another process, or another user's
            if parts.stat().st_mtime < oldest:
                with locked(parts / _LOCK, busy=f"{parts} is being written"):
                    shutil.rmtree(parts)


def cache_key(data: Data, tokenizer: Any, rules: SampleRules, *, reading: Reading, seed: int) -> str:
    """SHA-256 of everything that determines a tokenized set."""
    sources = [
        (
            source_digest(source.name),
            source.part.count and [source.part.count, seed],
            msgspec.to_builtins(reading_for(source.name, reading)),
        )
        for source in sources_of(data)
    ]
    decisive = msgspec.to_builtins(msgspec.structs.replace(rules, rows=None))
    return _digest([_VERSION, sources, tokenizer_digest(tokenizer), decisive])


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules, special tokens and chat template.

    The padding and truncation that a fast tokenizer keeps from its last call are left out.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(padding=None, truncation=None)
    else:
        rules = tokenizer.get_vocab()
    return _digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
