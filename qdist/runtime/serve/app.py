"""The server's addresses: who may ask, which requests are taken, and how answers go out."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qdist.core.telemetry.prometheus import CONTENT_TYPE
from qdist.core.text import format_bytes
from qdist.runtime.infer.answerer import Ended
from qdist.runtime.infer.decoding import as_written
from qdist.runtime.serve.asking import Asked, Served, asked_of, choices_in, served
from qdist.runtime.serve.bodies import Body, ChatBody, CompletionBody
from qdist.runtime.serve.desk import Answers, Desk
from qdist.runtime.serve.meters import Meters
from qdist.runtime.serve.reading import read_chat, read_completion
from qdist.runtime.serve.refusals import Refusal, json_response
from qdist.runtime.serve.shapes import ChatShape, Choice, CompletionShape, Shape, Usage

MOST_BODY_BYTES = 4 << 20
_SLOW_BODY_S = 30.0
"""Seconds in which the body of a request has to be there."""
_GONE = 499
"""Status for a client that went away, as nginx counts it."""
_RETRY_S = 5.0
T = TypeVar("T")
Phase = Literal["loading", "ready", "draining", "failed"]


class Service:
    """What the addresses share: whether the model is there, and the desk that takes questions to it.

    key: what clients must send; empty if anyone may ask. hosts: names by which clients may call the server; none for
    any.
    """

    def __init__(self, *, key: str = "", hosts: Sequence[str] = (), started: int = 0) -> None:
        self.key, self.hosts, self.started = key, frozenset(hosts), started
        self.phase: Phase = "loading"
        self.reason = ""
        self.meters = Meters()
        self.desk: Desk | None = None

    def open(self, desk: Desk) -> None:
        """Begin to answer."""
        self.desk, self.phase = desk, "ready"

    def fail(self, reason: str) -> None:
        """Answer no more."""
        self.phase, self.reason = "failed", reason

    def ready(self) -> Desk:
        """The desk. Raises Refusal, 503, while or after it takes no questions."""
        if self.desk is None or self.phase != "ready":
            why = {"loading": "the model is being loaded", "draining": "the server is ending"}
            raise Refusal(
                why.get(self.phase, f"the model stopped: {self.reason}"),
                try_="later",
                status=503,
                code=self.phase,
                retry_after_s=_RETRY_S,
            )
        return self.desk


def application(service: Service, pages: Sequence[Route] = ()) -> ASGIApp:
    """The server. pages: more addresses, such as those of a page in the browser; those under /run/ need the key."""
    routes = [
        Route("/v1/models", partial(_models, service), methods=["GET"]),
        Route("/v1/models/{name:path}", partial(_model, service), methods=["GET"]),
        Route("/v1/chat/completions", partial(_answer, service, read_chat), methods=["POST"]),
        Route("/v1/completions", partial(_answer, service, read_completion), methods=["POST"]),
        Route("/health", partial(_health, service), methods=["GET"]),
        Route("/metrics", partial(_metrics, service), methods=["GET"]),
        *pages,
    ]
    handlers = {Refusal: _refused, HTTPException: _not_found, ClientDisconnect: _went_away}
    guarded = [route.path for route in routes if route.path.startswith(("/v1/", "/metrics", "/run/"))]
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect has no words
    return _Guard(app, service, tuple(guarded))


class _Guard:
    """Lets in who may ask, and counts requests."""

    def __init__(self, app: ASGIApp, service: Service, guarded: Sequence[str]) -> None:
        self._app, self._service = app, service
        self._paths = [path.partition("{")[0] for path in guarded]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.meters.request(self._counted_as(scope["path"]), message["status"])
            await send(message)

        try:
            self._check(Request(scope))
        except Refusal as refusal:
            return await refusal.response()(scope, receive, counted)
        return await self._app(scope, receive, counted)

    def _counted_as(self, path: str) -> str:
        """One of a few names: clients choose paths, and must not choose how many series there are."""
        known = next((own for own in self._paths if path.startswith(own)), None)
        return known or ("/health" if path == "/health" else "other")

    def _check(self, request: Request) -> None:
        """Refuse who calls the server by another's name (as a page of the web may), or has no key."""
        if self._service.hosts and _host_name(request.headers.get("host", "")) not in self._service.hosts:
            raise Refusal(
                "the Host header names another server",
                try_="the address that qdist serve printed, or QDIST_API_KEY behind a proxy",
                status=403,
            )
        path, key = request.scope["path"], self._service.key  # a URL is made of the Host header, too
        if key and any(path.startswith(own) for own in self._paths):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), key.encode()):
                what = "the key is wrong" if given else "a key is needed"
                raise Refusal(what, try_="Authorization: Bearer KEY", status=401, code="invalid_api_key")


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower()


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _went_away(_: Request, __: Exception) -> Response:
    """Nobody reads it; it is counted."""
    return Response(status_code=_GONE)


async def _not_found(request: Request, error: Exception) -> Response:
    """What starlette itself refuses: an address or a method that there is not."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    what = f"{request.method[:20]} is not taken at {path!r}" if error.status_code == 405 else f"nothing is at {path!r}"
    headers = error.headers or {}
    taken = ", ".join(method for method in headers.get("Allow", "").split(", ") if method != "HEAD")
    answer = Refusal(
        what, try_=taken or "/v1/models, /v1/chat/completions, /v1/completions", status=error.status_code
    ).response()
    answer.headers.update(headers)
    return answer


async def _health(service: Service, _: Request) -> Response:
    content = {"status": service.phase} | ({"reason": service.reason} if service.reason else {})
    return json_response(content, status=200 if service.phase == "ready" else 503)


async def _metrics(service: Service, _: Request) -> Response:
    text = service.desk.figures() if service.desk else service.meters.text(working=0, waiting=0)
    return Response(text, media_type=CONTENT_TYPE)


async def _models(service: Service, _: Request) -> Response:
    desk = service.ready()
    return json_response({"object": "list", "data": [_about(service, desk, own) for own in desk.models.values()]})


async def _model(service: Service, request: Request) -> Response:
    desk = service.ready()
    return json_response(_about(service, desk, served(desk.models, request.path_params["name"])))


def _about(service: Service, desk: Desk, model: Served) -> dict[str, Any]:
    """OpenAI's model object; `parent` is the base of an adapter, as vLLM says it."""
    base = next((each.name for each in desk.models.values() if not each.adapter), None)
    parent = base if model.adapter else None
    return {"id": model.name, "object": "model", "created": service.started, "owned_by": "qdist", "parent": parent}


async def _answer(service: Service, read: Callable[[bytes], Body], request: Request) -> Response:
    """Read a request, put its questions into the line, and answer whole or as a stream."""
    desk = service.ready()
    body = read(await _body(request))
    model = served(desk.models, body.model)
    place = desk.hold(choices_in(body))
    try:
        work = desk.tokenized(partial(asked_of, body, model, desk.positions))
        asked = await _unless_gone(request.receive, work)
        service.ready()  # it may have begun to end meanwhile
        answers = desk.ask(asked.questions, place)
    except BaseException:
        place.release()
        raise
    service.meters.prompt(asked.prompt_tokens)
    shape = _shape(body, model, asked)
    if body.stream:
        return _Stream(_streamed(answers, shape, asked, body), answers)
    try:
        choices = await _unless_gone(request.receive, _collected(answers, len(asked.questions)))
    finally:
        answers.close()
    return json_response(shape.whole(choices, _usage(asked, choices)))


async def _body(request: Request) -> bytes:
    """The body. Raises Refusal for one that is no JSON, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # any page of the web may send a form or plain text to a server on this machine
        what = f"the body is said to be {kind[:40]!r}" if kind else "the body's type is not said"
        raise Refusal(what, try_="Content-Type: application/json", status=415)
    most = f"a body has {format_bytes(MOST_BODY_BYTES)} at most"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BODY_BYTES:
        raise Refusal(f"{most}, and this one {format_bytes(int(length))}", try_="a shorter prompt", status=413)
    parts = bytearray()
    try:
        async with asyncio.timeout(_SLOW_BODY_S):
            async for part in request.stream():
                parts += part
                if len(parts) > MOST_BODY_BYTES:
                    raise Refusal(f"{most}, and this one more", try_="a shorter prompt", status=413)
    except TimeoutError:
        raise Refusal(f"the body was not there within {_SLOW_BODY_S:g} s", try_="again", status=408) from None
    return bytes(parts)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled if the client goes away. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collected(answers: Answers, count: int) -> list[Choice]:
    choices = [Choice() for _ in range(count)]
    async for index, what in answers.told():
        choices[index].add(what)
    return choices


def _shape(body: Body, model: Served, asked: Asked) -> Shape:
    """How the answers to a request are written."""
    tokenizer, usage = model.speech.tokenizer, body.includes_usage
    if isinstance(body, ChatBody):
        return ChatShape(model.name, tokenizer, logprobs=body.logprobs, includes_usage=usage)
    assert isinstance(body, CompletionBody)
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [each for each in given if isinstance(each, str)]
    if body.echo and not texts:
        texts = [as_written(tokenizer, question.prompt) for question in asked.questions[:: body.n]]
    echoed = [text for text in texts for _ in range(body.n)] if body.echo else []
    logprobs = isinstance(body.logprobs, int)
    return CompletionShape(model.name, tokenizer, logprobs=logprobs, includes_usage=usage, echoed=echoed)


def _usage(asked: Asked, choices: Sequence[Choice]) -> Usage:
    return Usage(asked.prompt_tokens, sum(choice.ended.new_tokens for choice in choices if choice.ended))


class _Stream(StreamingResponse):
    """Server-sent events; whichever way it ends, what has not been answered by then is cancelled."""

    def __init__(self, content: AsyncIterator[bytes], answers: Answers) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold pieces back
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _streamed(answers: Answers, shape: Shape, asked: Asked, body: Body) -> AsyncIterator[bytes]:
    """The events of a stream. A failure of the model is one as well; [DONE] does not follow it."""
    for index in range(len(asked.questions)):
        for chunk in shape.first(index):
            yield _event(chunk)
    new = 0
    try:
        async for index, what in answers.told():
            new += what.new_tokens if isinstance(what, Ended) else 0
            chunks = shape.last(index, what) if isinstance(what, Ended) else shape.piece(index, what)
            for chunk in chunks:
                yield _event(chunk)
    except Refusal as refusal:
        yield _event(refusal.content())
        return
    if body.includes_usage:
        yield _event(shape.usage(Usage(asked.prompt_tokens, new)))
    yield b"data: [DONE]\n\n"


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
