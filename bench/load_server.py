"""Does the server keep its head under load? `python bench/load_server.py [--model smollm2-135m] [--requests 500]
[--rounds 1]`.

Starts `qdist serve` on CPU; 64 clients send 500 good requests by OpenAI's own client, whole and streamed, while 50
others go away in the middle, 50 send what is malformed and 10 what is too large. Then prints what was answered, what
the server wrote, and its resident memory, file descriptors and threads before and after. Exits with the number of
faults: a good request that was not answered, a traceback, a descriptor that stayed open.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import openai

CLIENTS = 64
ORDERS = ("Name a colour.", "Count to three.", "What do owls eat?", "Say hello.", "Which day follows Monday?")


class Held(NamedTuple):
    """What a process holds."""

    rss_mib: float
    descriptors: int
    threads: int


def held_by(pid: int) -> Held:
    """What a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads"))
    return Held(rss / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads)


def child_of(pid: int) -> int:
    """The process that a command started to do the work."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


async def good(client: openai.AsyncOpenAI, model: str, number: int) -> str:
    """Ask, whole or streamed; 'answered' or what came instead."""
    order: Any = [{"role": "user", "content": ORDERS[number % len(ORDERS)]}]
    given: Any = {"model": model, "messages": order, "max_tokens": 4 + number % 13, "seed": number}
    try:
        if number % 2:
            stream = await client.chat.completions.create(**given, stream=True)
            ends = [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices]
            return "answered" if ends[-1] else "cut"
        found = await client.chat.completions.create(**given)
        return "answered" if found.choices[0].finish_reason else "cut"
    except openai.APIError as error:
        return type(error).__name__


async def cut_off(http: httpx.AsyncClient, model: str, number: int) -> str:
    """Ask for a long answer, and go away: in the line, or after some pieces."""
    body = {"model": model, "messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 400}
    try:
        async with (
            asyncio.timeout(0.2 + number % 7),
            http.stream("POST", "/chat/completions", json={**body, "stream": number % 3 > 0}) as answer,
        ):
            async for _ in answer.aiter_bytes():
                pass
    except TimeoutError:
        return "went away"
    return "answered before"


async def refused(http: httpx.AsyncClient, content: bytes) -> str:
    """Send what cannot be answered."""
    found = await http.post("/chat/completions", content=content, headers={"Content-Type": "application/json"})
    return f"refused with {found.status_code}"


async def load(port: int, model: str, count: int) -> Counter[str]:
    """All of it at once, in a mixed order; how often what was the outcome."""
    base = f"http://127.0.0.1:{port}/v1"
    limits = httpx.Limits(max_connections=CLIENTS)
    http = httpx.AsyncClient(base_url=base, timeout=900, limits=limits)
    client = openai.AsyncOpenAI(base_url=base, api_key="none", timeout=900, max_retries=20)
    wrong = (b"{", b"[]", b'{"model": 3}', b'{"model": "%s", "messages": []}' % model.encode(), b'{"a": 1e999}')
    works = [("good", good(client, model, number)) for number in range(count)]
    works += [("cut off", cut_off(http, model, number)) for number in range(count // 10)]
    works += [("malformed", refused(http, wrong[number % len(wrong)])) for number in range(count // 10)]
    works += [("oversized", refused(http, b" " * (5 << 20))) for _ in range(count // 50)]
    random.Random(0).shuffle(works)
    outcomes, line = Counter[str](), iter(works)

    async def one_client() -> None:
        for kind, work in line:
            outcomes[f"{kind}: {await work}"] += 1

    async with http, client:
        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    return outcomes


def wait_until_ready(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Wait until the model is loaded."""
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server ended while it was started")


def main() -> None:
    """Print the outcomes, and what the server held."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it, to see whether anything grows")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--log", type=Path, default=Path("/tmp/load_server.log"))
    given = parser.parse_args()
    words = ["serve", given.model, "--port", str(given.port), "--context", "1024", "--slots", "16"]
    with open(given.log, "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "qdist", *words], stdout=log, stderr=log)
        try:
            wait_until_ready(given.port, server)
            pid = child_of(server.pid)
            asyncio.run(load(given.port, given.model, CLIENTS))  # first, so that what is allocated once is
            before, begun = held_by(pid), time.monotonic()
            outcomes = Counter[str]()
            for number in range(given.rounds):
                outcomes += asyncio.run(load(given.port, given.model, given.requests))
                print(f"round {number + 1}, {time.monotonic() - begun:.0f} s: {held_by(pid)}", flush=True)
            seconds = time.monotonic() - begun
            time.sleep(1)
            after = held_by(pid)
            metrics = httpx.get(f"http://127.0.0.1:{given.port}/metrics").text
        finally:
            server.terminate()
            code = server.wait(60)
    written = given.log.read_text(errors="replace")
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:5}  {outcome}")
    print(f"{seconds:.0f} s; exit code {code}; {written.count('Traceback')} tracebacks in {len(written):,} characters")
    for name, held in (("before", before), ("after", after)):
        print(f"{name:7} {held.rss_mib:8,.0f} MiB  {held.descriptors:4} descriptors  {held.threads:4} threads")
    print(*(line for line in metrics.splitlines() if re.match("qdist_serve_(answers|requests)", line)), sep="\n")
    unanswered = given.rounds * given.requests - outcomes["good: answered"]
    raise SystemExit(unanswered + written.count("Traceback") + max(0, after.descriptors - before.descriptors) + code)


if __name__ == "__main__":
    main()
