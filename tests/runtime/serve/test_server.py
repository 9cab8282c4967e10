"""Does the server begin, end, and treat connections as it should, on a port of its own?"""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest

from qdist.core.errors import JobError, MachineError, ModelError, QdistError
from qdist.host.sources.targets import ServedTargets
from qdist.runtime.infer.ready import Ready
from qdist.runtime.serve import server
from qdist.runtime.serve.connections import Connection
from tests.runtime.serve.fake import SPEECH, Echo, until

TARGETS = ServedTargets({"sql": "runs/sql"}, "base")
CHAT = {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}


class Serving(NamedTuple):
    client: httpx.AsyncClient
    port: int
    task: "asyncio.Task[None]"


@asynccontextmanager
async def serving(echo: Echo, *, load: Callable[[], Ready] | None = None, most: int = 64) -> AsyncIterator[Serving]:
    """A server on a free port, until the test ends it by a signal."""
    ready = Ready(echo, {"": SPEECH, "sql": SPEECH}, "on nothing")
    with server.bound_to("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        serve = server.serve(listening, TARGETS, load or (lambda: ready), most=most, host="127.0.0.1")
        task = asyncio.ensure_future(serve)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield Serving(client, port, task)
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(20):
            with suppress(QdistError):
                await task


async def ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0)


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection."""
    async with asyncio.timeout(20):
        return await reader.read()


def test_what_is_running_at_a_signal_is_finished_and_nothing_else_begun(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        echo = Echo(hold=True)
        async with serving(echo) as (client, port, task):
            await ready(client)
            running = asyncio.ensure_future(client.post("/v1/chat/completions", json=CHAT))
            await until(lambda: echo.working == 1)
            for _ in range(2):  # one that came to the parent as well
                os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(20):
                while (refused := await client.get("/health")).json() != {"status": "draining"}:
                    await asyncio.sleep(0)
            assert refused.status_code == 503
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
            echo.let(100)
            assert (await running).json()["choices"][0]["message"]["content"] == "<user>hi<assistant>"
            async with asyncio.timeout(20):
                await task
        assert f"serving sql at http://127.0.0.1:{port}/v1 (models: sql, base)\n" in capsys.readouterr().out

    asyncio.run(run())


def test_while_a_model_is_loaded_the_server_says_so_and_ends_at_once_by_a_signal() -> None:
    async def run() -> None:
        import threading

        wait = threading.Event()

        def load() -> Ready:
            wait.wait(20)
            raise ModelError("never mind")

        async with serving(Echo(), load=load) as (client, _, task):
            assert (await client.get("/health")).json() == {"status": "loading"}
            assert (await client.get("/v1/models")).status_code == 503
            assert "qdist_serve_answers_working 0" in (await client.get("/metrics")).text
            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(20):
                await task
        wait.set()

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load() -> Ready:
        raise ModelError("no such model")

    async def run() -> None:
        async with serving(Echo(), load=load) as (_, _, task):
            with pytest.raises(ModelError, match="no such model"):
                await task

    asyncio.run(run())


def test_a_model_that_fails_ends_the_server_after_its_clients_were_told() -> None:
    async def run() -> None:
        async with serving(Echo(fail_at=2)) as (client, _, task):
            await ready(client)
            told = await client.post("/v1/chat/completions", json=CHAT)
            assert (told.status_code, "logits are NaN" in told.text) == (503, True)
            with pytest.raises(JobError, match="logits are NaN"):
                await task

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a", b"GET /health HTTP/1.1\r\n"])
def test_a_client_that_is_silent_is_disconnected(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.05)

    async def run() -> None:
        async with serving(Echo()) as (_, port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert await closed(reader) == b""
            writer.close()

    asyncio.run(run())


def test_a_connection_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "most", 1)

    async def run() -> None:
        async with serving(Echo()) as (client, port, _):
            await client.get("/health")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head, _, body = (await closed(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"too many connections" in body
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\n\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"POST /v1 HTTP/1.1\r\nContent-Length: x\r\n\r\n"],
)
def test_what_is_not_http_gets_a_400(sent: bytes) -> None:
    async def run() -> None:
        async with serving(Echo()) as (_, port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert (await closed(reader)).startswith(b"HTTP/1.1 400 ")
            writer.close()

    asyncio.run(run())


def test_what_is_not_http_behind_a_request_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        echo = Echo(hold=True)
        async with serving(echo) as (client, port, _):
            await ready(client)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head)  # refused at once for its type, while its body is still to come
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 415 ")
            writer.write(b"no chunk\r\n\r\n")
            await closed(reader)
            writer.close()

    asyncio.run(run())
    assert caplog.text == ""


def test_a_port_that_is_taken_is_an_error_with_another_to_try() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=rf"127.0.0.1:{port} cannot be served: Address already in use") as raised:
            server.bound_to("127.0.0.1", port)
        assert raised.value.try_ == f"--port {port + 1}"


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_a_loopback_address_is_called_by_a_few_names_alone(host: str, inside: bool) -> None:
    names = server.loopback_names(host)
    assert (host in names, "localhost" in names) == (inside, inside)


def test_who_serves_the_world_without_a_key_is_warned(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        with server.bound_to("127.0.0.1", 0) as listening:
            ready: Any = Ready(Echo(), {"": SPEECH}, "here")
            task = asyncio.ensure_future(
                server.serve(listening, ServedTargets({"": "m"}, "m"), lambda: ready, most=1, host="0.0.0.0")
            )
            await until(lambda: "serving m at" in capsys.readouterr().out)
            os.kill(os.getpid(), signal.SIGTERM)
            await task

    asyncio.run(run())
