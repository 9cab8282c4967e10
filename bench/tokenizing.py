"""How fast a large file is tokenized, in how much memory: `python bench/tokenizing.py TOKENIZER RECORDS [--size 1GB]`.

Writes a JSONL file of that size from the records of a small one, and tokenizes it by qdist and by `datasets.map` with
the same tokenizer and columns, each in processes of its own; with --kill, qdist's is killed after so many seconds first
and started again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from qdist.core.data.conversation import Conversation
from qdist.core.data.reading import AS_FOUND
from qdist.core.spec.sections import Data
from qdist.core.text import format_bytes, parse_bytes
from qdist.host.data.records import read_conversations

SEQ_LEN = 2048


def main() -> None:
    """Print a table with a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("records")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("1GB"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kill", type=float, default=0.0, help="seconds after which qdist is killed once")
    parser.add_argument("--only", choices=("qdist", "datasets"))
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(WAYS[given.only](given.tokenizer, *map(Path, given.inside), given.workers)))
        return
    with tempfile.TemporaryDirectory(prefix="qdist-tokenize-") as name:
        source = Path(name, "data.jsonl")
        count = write(source, Path(given.records), given.size)
        print(f"{count:,} records, {format_bytes(source.stat().st_size)}, {given.workers} workers", flush=True)
        for way in (given.only,) if given.only else WAYS:
            command = [sys.executable, __file__, given.tokenizer, given.records, "--workers", str(given.workers)]
            command += ["--only", way, "--inside", str(source), str(Path(name, way))]
            if given.kill and way == "qdist":
                print(measured("qdist, killed", command, given.workers, most_s=given.kill), flush=True)
            print(measured(way, command, given.workers), flush=True)


def write(path: Path, records: Path, size: int) -> int:
    """Write conversations of a file in an order of chance, over and over, numbered, until the file has its size."""
    found = [each for each in read_conversations(str(records)) if isinstance(each, Conversation)]
    chance, written, count = random.Random(0), 0, 0
    with path.open("w") as file:
        while written < size:
            own = chance.choice(found)
            messages = [{"role": turn.role, "content": turn.said} for turn in own.turns]
            messages[0]["content"] += f" ({count})"
            written += file.write(json.dumps({"messages": messages}) + "\n")
            count += 1
    return count


class Seen(NamedTuple):
    """The most that was seen of a process."""

    peak_bytes: int
    cpu_s: float


def measured(way: str, command: Sequence[str], workers: int, *, most_s: float = float("inf")) -> str:
    """A line on a run: seconds, tokens/s, the processor's seconds, and the memory of its largest processes."""
    began, seen = time.monotonic(), dict[int, Seen]()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        if time.monotonic() - began > most_s:
            child.kill()
            break
        for pid in family(child.pid):
            seen[pid] = look(pid) or seen.get(pid, Seen(0, 0))
        time.sleep(0.2)
    told = child.communicate()[0]
    seconds = time.monotonic() - began
    found = json.loads(told.splitlines()[-1]) if told.strip() else {"tokens": 0, "samples": 0, "seconds": seconds}
    cpu = sum(each.cpu_s for each in seen.values())
    peaks = [format_bytes(each.peak_bytes) for each in (seen[child.pid], *sorted(
        (own for pid, own in seen.items() if pid != child.pid), reverse=True)[:2])]  # fmt: skip
    rate, tokens = found["tokens"] / found["seconds"] / workers, found["tokens"]
    return (
        f"{way:14} {found['seconds']:7.1f} s, {found['samples']:,} samples, {tokens:,} tokens, {rate:,.0f} tokens/s a "
        f"worker, {tokens / cpu:,.0f} per second of a core, peak {peaks[0]}; others {', '.join(peaks[1:])}"
    )


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = task.read_text().split()
        except OSError:
            continue
        for child in map(int, below):
            yield from family(child)


def look(pid: int) -> Seen | None:
    """A process's peak memory and time until now; None if it is gone."""
    try:
        status, stat = Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    if "VmHWM:" not in status:
        return None
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    user, system = stat.rpartition(")")[2].split()[11:13]
    return Seen(peak, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))


def by_qdist(tokenizer: str, source: Path, folder: Path, workers: int) -> dict[str, float]:
    """Tokenize as `qdist launch` does."""
    from transformers import AutoTokenizer

    from qdist.runtime.data.parts import processes
    from qdist.runtime.data.token_cache import cached_tokenize
    from qdist.runtime.data.tokenizing import SampleRules

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    began = time.monotonic()
    made, _ = cached_tokenize(
        Data(path=str(source)), loaded, SampleRules(seq_len=SEQ_LEN), reading=AS_FOUND, seed=0, folder=folder,
        workers=lambda _, *own: processes(workers, *own),
    )  # fmt: skip
    return {"seconds": time.monotonic() - began, "samples": len(made), "tokens": len(made.tokens)}


def by_datasets(tokenizer: str, source: Path, folder: Path, workers: int) -> dict[str, float]:
    """Tokenize as TRL does: the prompt and the whole through the chat template, the prompt without a loss."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(record: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
        messages = record["messages"]
        prompt = loaded.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        whole = loaded.apply_chat_template(messages, return_dict=False)[:SEQ_LEN]
        return {"input_ids": whole, "labels": ([-100] * len(prompt) + whole[len(prompt) :])[:SEQ_LEN]}

    began = time.monotonic()
    data = load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder))
    mapped = data.map(encode, remove_columns=["messages"], num_proc=workers if workers > 1 else None)
    seconds = time.monotonic() - began
    first = list(islice(mapped, 1000))
    mean = sum(len(record["input_ids"]) for record in first) / len(first)
    return {"seconds": seconds, "samples": len(mapped), "tokens": round(mean * len(mapped))}


WAYS = {"qdist": by_qdist, "datasets": by_datasets}

if __name__ == "__main__":
    main()
