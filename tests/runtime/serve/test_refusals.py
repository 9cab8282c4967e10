"""Is every request that cannot be answered told which field, which value, and what would do?"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2 as httpx
import pytest

from qdist.core.errors import DataError, JobError
from qdist.runtime.infer.answerer import Question
from qdist.runtime.serve import app
from tests.runtime.serve.fake import Echo, Started, started, until

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Test = Callable[[httpx.AsyncClient, Started], Awaitable[None]]


def asking(test: Test, **given: Any) -> None:
    async def run() -> None:
        async with started(**given) as server:
            transport = httpx.ASGITransport(app=server.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                await test(client, server)

    asyncio.run(run())


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sql", "messages": MESSAGES, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "sql", "prompt": "hi", **fields}


def of_user(content: Any, **more: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": content, **more}])


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "no json"}}
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": MESSAGES}, "model", "model is missing"),
    (CHAT, {"model": "sql"}, "messages", "messages is missing"),
    (CHAT, chat(messages=[]), "messages", "cannot be an empty list: it is a list of length >= 1"),
    (CHAT, chat(messages=MESSAGES * 4097), "messages", "cannot be a list of 4,097: it is a list of length <= 4096"),
    (CHAT, chat(messages="hi"), "messages", 'cannot be "hi": it is a list'),
    (CHAT, chat(messages=[{"role": "bot", "content": ""}]), "messages[0].role", "it is system, developer, user"),
    (CHAT, of_user(3), "messages[0].content", "it is text or a list"),
    (CHAT, of_user(None), "messages[0].content", "is missing"),
    (CHAT, of_user([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", "images, sound and files"),
    (CHAT, of_user("hi", name="me"), "messages[0].name", "not supported"),
    (CHAT, of_user("refuse"), "messages", "the messages: it does not like that"),
    (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [CALL]}]), "messages[0].tool_calls[0].function.arguments",
     "it is a JSON object, as text"),
    (CHAT, chat(messages=[{"role": "assistant"}]), "messages[0].content", "is missing"),
    (CHAT, chat(temperature="hot"), "temperature", 'cannot be "hot": it is a number'),
    (CHAT, chat(temperature=-1), "temperature", "cannot be -1.0: it is a number >= 0"),
    (CHAT, chat(top_p=0), "top_p", "it is a number > 0"),
    (CHAT, chat(min_p=2), "min_p", "it is a number <= 1"),
    (CHAT, chat(top_k=1.5), "top_k", "it is an integer"),
    (CHAT, chat(n=17), "n", "it is an integer <= 16"),
    (CHAT, chat(n=True), "n", "cannot be true: it is an integer"),
    (CHAT, chat(seed=2**63), "seed", "it is an integer <= 9223372036854775807"),
    (CHAT, chat(seed=10**400), "seed", "64 bits"),
    (CHAT, chat(stop=["a"] * 17), "stop", "a list of length <= 16"),
    (CHAT, chat(stop=""), "stop", "an empty text stands everywhere"),
    (CHAT, chat(presence_penalty=3), "presence_penalty", "<= 2"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty", "> 0"),
    (CHAT, chat(top_logprobs=2), "top_logprobs", "logprobs is false"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "<= 20"),
    (CHAT, chat(max_tokens=0), "max_tokens", ">= 1"),
    (CHAT, chat(max_tokens=5, max_completion_tokens=5), "max_completion_tokens", "max_tokens says it as well"),
    (CHAT, chat(max_tokens=250), "max_tokens", "max_tokens is 250, and messages has 19 of the 256 positions"),
    (CHAT, of_user("x" * 300), "messages", "messages has 317 tokens, and there are 256 positions"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "a call cannot be forced"),
    (CHAT, chat(tools=[{"type": "retrieval"}]), "tools[0].type", "it is function"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format.type", "not bound to a grammar"),
    (CHAT, chat(store=True), "store", "nothing is kept here"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "goes with stream: true"),
    (CHAT, chat(logit_bias={"5": 1}), "logit_bias", "not supported by this server; try: leave it out"),
    (CHAT, chat(temprature=1), "temprature", "try: temperature"),
    (CHAT, chat(prompt="x"), "prompt", "not supported"),
    (TEXT, text(prompt=[]), "prompt", "a list of length >= 1"),
    (TEXT, text(prompt=""), "prompt", "no token to go on from"),
    (TEXT, text(prompt=["a", 3]), "prompt", "not of several kinds"),
    (TEXT, text(prompt=[999]), "prompt", "the vocabulary has the tokens 0 to 256"),
    (TEXT, text(prompt=[[1], [-1]]), "prompt[1]", "the vocabulary has the tokens"),
    (TEXT, text(prompt=["a"] * 257), "prompt", "256 prompts at most"),
    (TEXT, text(echo=True, logprobs=1), "echo", "of a prompt's tokens are not computed"),
    (TEXT, text(best_of=2), "best_of", "not supported by this server; try: n"),
    (TEXT, text(suffix="x"), "suffix", "not supported"),
]  # fmt: skip


def test_wrong_fields_are_named_with_their_value_and_what_would_do() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        for path, body, field, words in WRONG:
            found = await client.post(path, json=body)
            error = found.json()["error"]
            assert (found.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error"), error
            assert words in error["message"], error["message"]
        assert server.desk.idle

    asking(test)


def test_fields_that_change_nothing_and_nulls_are_taken() -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": None}
        assert (await client.post(CHAT, json=chat(**harmless, temperature=None, stop=None))).status_code == 200

    asking(test)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'{"a": NaN}', "the body is not JSON"),
        (b'{"a": 1e999}', "a number that no program can hold"),
        (b'{"a": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "the body is a list of 1; try: a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        found = await client.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
        assert found.status_code == 400
        assert words in found.json()["error"]["message"]

    asking(test)


def test_a_body_that_a_page_of_the_web_may_send_is_refused() -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        found = await client.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": "text/plain"})
        assert found.status_code == 415
        assert "Content-Type: application/json" in found.json()["error"]["message"]

    asking(test)


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not() -> None:
    async def pieces() -> Any:
        for _ in range(5):
            yield b"x" * (1 << 20)

    async def test(client: httpx.AsyncClient, _: Started) -> None:
        for content in (b"x" * (5 << 20), pieces()):
            found = await client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
            assert found.status_code == 413
            assert "4.0 MiB at most" in found.json()["error"]["message"]

    asking(test)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_SLOW_BODY_S", 0.01)

    async def never() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    async def test(client: httpx.AsyncClient, _: Started) -> None:
        found = await client.post(CHAT, content=never(), headers={"Content-Type": "application/json"})
        assert found.status_code == 408

    asking(test)


def test_other_addresses_and_methods_are_refused_in_json() -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        others = "/v1/models, /v1/chat/completions, /v1/completions"
        refused = (("GET", "/v2", 404, others), ("GET", CHAT, 405, "POST"), ("DELETE", "/v1/models", 405, "GET"))
        for method, path, status, try_ in refused:
            found = await client.request(method, path)
            told = found.json()["error"]["message"]
            assert (found.status_code, path in told, told.partition("; try: ")[2]) == (status, True, try_)
        assert (await client.get("/v1/models/none")).status_code == 404

    asking(test)


def test_a_key_is_wanted_where_one_is_set() -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        given = {"": 401, "Bearer": 401, "Bearer wrong": 401, "Bearer s\u00e9cret": 401, "Bearer secret": 200}
        for header, status in given.items():
            for path in ("/v1/models", "/metrics"):
                found = await client.get(path, headers={"Authorization": header.encode("latin-1")})  # type: ignore[dict-item]
                assert found.status_code == status, header
        assert (await client.post(CHAT, json=chat())).json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health")).status_code == 200

    asking(test, key="secret")


def test_a_server_on_this_machine_is_not_called_by_another_name() -> None:
    async def test(client: httpx.AsyncClient, _: Started) -> None:
        named = {"localhost:8000": 200, "127.0.0.1": 200, "[::1]:80": 200, "evil.example": 403, "": 403, "[": 403}
        for host, status in named.items():
            assert (await client.get("/v1/models", headers={"Host": host})).status_code == status, host

    asking(test, hosts=("localhost", "127.0.0.1", "::1"))


def test_one_too_many_is_told_when_to_come_again() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        first = asyncio.ensure_future(client.post(CHAT, json=chat(n=3)))
        await until(lambda: server.echo.working == 3)
        found = await client.post(CHAT, json=chat(n=2))
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(found.headers["Retry-After"]) <= 600
        assert (await client.post(CHAT, json=chat(n=5))).status_code == 400
        second = asyncio.ensure_future(client.post(CHAT, json=chat()))
        await until(lambda: server.echo.working == 4)
        server.echo.let(100)
        assert [(await each).status_code for each in (first, second)] == [200, 200]
        assert server.desk.idle

    asking(test, echo=Echo(hold=True), most=4)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_while_in_line_or_at_work_frees_the_place(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        body = json.dumps(chat(stream=stream)).encode()
        gone, sent = asyncio.Event(), list[Any]()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "asgi": {"spec_version": "2.3"},
        }  # fmt: skip
        busy = asyncio.ensure_future(client.post(CHAT, json=chat()))
        await until(lambda: server.echo.working == 1)
        waiting = asyncio.ensure_future(server.app(scope, receive, send))
        await until(lambda: server.echo.waiting == 1)
        gone.set()
        await waiting
        await until(lambda: server.echo.waiting == 0)
        assert not server.desk.idle
        busy.cancel()
        await until(lambda: server.desk.idle and server.echo.working == 0)
        if not stream:
            assert sent[0]["status"] == 499

    asking(test, echo=Echo(slots=1, hold=True))


def test_who_waits_when_the_model_fails_is_told_so() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        found, stream = await asyncio.gather(client.post(CHAT, json=chat()), client.post(CHAT, json=chat(stream=True)))
        assert found.status_code == 503
        assert "the model stopped: logits are NaN at token 3" in found.json()["error"]["message"]
        last = stream.text.strip().split("\n\n")[-1]
        assert "logits are NaN" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.desk.idle
        assert isinstance(server.runner.failed, JobError)
        assert (await client.post(CHAT, json=chat())).status_code == 503

    asking(test, echo=Echo(fail_at=3))


def test_an_answer_that_cannot_go_on_is_told_so_and_others_go_on() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        server.echo.errors = {"!": JobError("logits are NaN at token 3"), "?": DataError("no", try_="yes")}
        failed = await client.post(TEXT, json=text(prompt="hi!"))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "answer_failed")
        assert (await client.post(TEXT, json=text(prompt=["ab?", "cd"]))).status_code == 400
        stream = await client.post(TEXT, json=text(prompt="hi!", stream=True))
        assert "logits are NaN" in stream.text
        assert "[DONE]" not in stream.text
        assert (await client.post(TEXT, json=text())).json()["choices"][0]["text"] == "hi"
        await until(lambda: server.desk.idle)

    asking(test)


def test_an_answer_that_has_ended_has_no_place_however_slowly_it_is_read() -> None:
    async def run() -> None:
        async with started(most=1) as server:
            place = server.desk.hold(1)
            answers = server.desk.ask([Question([5, 6, 7])], place)
            await until(lambda: server.desk.idle)
            assert [type(heard.what).__name__ async for heard in answers.told()] == ["Piece"] * 3 + ["Ended"]
            answers.close()

    asyncio.run(run())


def test_health_says_whether_there_is_a_model() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        assert (await client.get("/health")).json() == {"status": "ready"}
        server.service.phase = "draining"
        refused = await client.post(CHAT, json=chat())
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        server.service.fail("NaN")
        found = await client.get("/health")
        assert (found.status_code, found.json()) == (503, {"status": "failed", "reason": "NaN"})

    asking(test)


def test_the_figures_count_requests_tokens_and_waits() -> None:
    async def test(client: httpx.AsyncClient, server: Started) -> None:
        await client.post(CHAT, json=chat(max_tokens=4))
        await client.post(CHAT, json={})
        await client.get("/anything")
        lines = (await client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['qdist_serve_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
        assert values['qdist_serve_requests_total{path="/v1/chat/completions",status="400"}'] == "1.0"
        assert values['qdist_serve_requests_total{path="other",status="404"}'] == "1.0"
        assert (values["qdist_serve_prompt_tokens_total"], values["qdist_serve_answer_tokens_total"]) == ("19", "4")
        assert (values["qdist_serve_later_tokens_total"], values["qdist_serve_answers_working"]) == ("3", "0")
        assert float(values["qdist_serve_first_token_seconds_total"]) > 0

    asking(test)
