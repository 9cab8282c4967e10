"""Does any request make the server fail? `python bench/fuzz_server.py [--count 10000] [--seed 0] [--url http://...]`.

Valid bodies are changed by type, size, nesting, unicode and number, in one to four places; methods, paths and headers
are changed as well. Without --url the server's application is asked in this process, over an answerer that says its
prompt again. Prints counts by status; 4xx and 2xx are right, 5xx and exceptions are not. Exits with their number.
"""

import argparse
import asyncio
import copy
import json
import random
from collections import Counter
from typing import Any

import httpx2 as httpx

CHAT: dict[str, Any] = {
    "model": "sql",
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ],
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "n": 2, "stop": ["a", "b"], "seed": 5,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logprobs": True, "top_logprobs": 2,
    "stream": False, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model": "base", "prompt": ["abc", "de"], "max_tokens": 2, "echo": False, "logprobs": 1, "stop": "x", "n": 1,
    "stream": True, "stream_options": {"include_usage": True}, "temperature": 1, "seed": -3,
}  # fmt: skip
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/", "/v1", "/v1/models/%00", "//",
    "/v1/chat/completions/", "/v1/../health", "/v1/models/" + "a" * 3000, "/\u00e9", "/v1/models/sql?x=%ff",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QDIST")
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 17, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    10**400, float("nan"), float("inf"), "", " ", "a", "\x00", "\ud800", "\U0001f600\u200d", "\u202e", "e\u0301" * 50,
    "a" * 5000, "<end>", "{}", "null", [], [[]], {}, {"": None}, [None], ["a"] * 300, [0], [-1], [10**9], [[0], [1]],
    {"type": "text"}, {"role": "user", "content": "x"}, {"type": "image_url"}, "text", "function", "auto", "user",
)  # fmt: skip


def deep(levels: int) -> Any:
    """A list in a list, and so on."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a body."""
    found = [path] if path else []
    if len(path) > 8:
        return found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(body: dict[str, Any], draw: random.Random) -> Any:
    """A body with a few values replaced, removed, doubled or added."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(0, 4)):
        *way, last = draw.choice(places(body) or [("model",)])
        inner = body
        for key in way:
            inner = inner[key]
        match draw.randrange(6):
            case 0 if isinstance(inner, dict):
                inner.pop(last, None)
            case 1 if isinstance(inner, dict):
                inner[draw.choice(("name", "foo", "type", "content", "tool_calls", "x" * 500))] = copy.deepcopy(
                    draw.choice(ODD)
                )
            case 2 if isinstance(inner, list):
                inner += inner * draw.randint(1, 8)
            case 3:
                inner[last] = deep(draw.choice((5, 400, 3000)))
            case _:
                inner[last] = copy.deepcopy(draw.choice(ODD))
    return body


def encoded(body: Any, draw: random.Random) -> bytes:
    """A body as bytes, sometimes cut, damaged or with a number that no program holds."""
    try:
        raw = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        raw = b"[" * 3000
    match draw.randrange(20):
        case 0:
            return raw[: draw.randrange(len(raw) + 1)]
        case 1:
            at = draw.randrange(len(raw))
            return raw[:at] + draw.randbytes(draw.randint(1, 4)) + raw[at + 1 :]
        case 2:
            return raw.replace(b"0.5", b"1e999").replace(b"0.9", b"9" * 5000)
        case 3:
            return draw.randbytes(draw.randrange(200))
        case 4:
            return raw.replace(b'"model"', b'"model": 1, "model"', 1)
    return raw


def request_of(draw: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request."""
    chat = draw.random() < 0.6
    method, path = "POST", PATHS[0 if chat else 1]
    if draw.random() < 0.1:
        method, path = draw.choice(METHODS), draw.choice(PATHS)
    kind = draw.choice(("text/plain", "", "application/json; charset=latin-1")) if draw.random() < 0.05 else None
    headers = {"Content-Type": "application/json" if kind is None else kind}
    if draw.random() < 0.03:
        headers |= {"Authorization": draw.choice(("Bearer x", "Basic \u00e9", "")), "Accept": "\u00ff" * 50}
    return method, path, headers, encoded(changed(CHAT if chat else TEXT, draw), draw)


async def fuzz(client: httpx.AsyncClient, count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Counts by status, and a line for each request that the server failed at or refused without a reason."""
    draw, statuses, bad = random.Random(seed), Counter[int](), list[str]()
    requests = [request_of(draw) for _ in range(count)]

    async def worker(own: list[tuple[str, str, dict[str, str], bytes]]) -> None:
        for method, path, headers, body in own:
            latin = {name: value.encode("latin-1") for name, value in headers.items()}
            found = await client.request(method, path, headers=latin, content=body)
            statuses[found.status_code] += 1
            reason = method == "HEAD" or path in ("/health", "/metrics") or found.status_code < 300
            if found.status_code >= 500 or not (reason or found.json()["error"]["message"]):
                bad.append(f"{found.status_code} {method} {path[:80]} {body[:300]!r} -> {found.text[:200]}")

    await asyncio.gather(*(worker(requests[start::16]) for start in range(16)))
    return statuses, bad


async def in_process(count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """The same against an application in this process."""
    from tests.runtime.serve.fake import started

    async with started(most=10_000) as server:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = await fuzz(client, count, seed)
        assert server.desk.idle, "places were not given back"
        return found


async def at(url: str, count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """The same against a server that runs."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return await fuzz(client, count, seed)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    given = parser.parse_args()
    run = at(given.url, given.count, given.seed) if given.url else in_process(given.count, given.seed)
    statuses, bad = asyncio.run(run)
    for status, number in sorted(statuses.items()):
        print(f"{status}  {number:6,}")
    print(*bad[:20], sep="\n")
    print(f"{sum(statuses.values()):,} requests, {len(bad)} failures")
    raise SystemExit(min(len(bad), 255))


if __name__ == "__main__":
    main()
