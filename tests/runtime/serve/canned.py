"""A server of the page that answers in OpenAI's protocol without a model: what it says depends on the question."""

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qdist.host.run.rundir import RunDir
from qdist.runtime.serve.web import page_routes

BASE, ADAPTER = "smollm2-135m", "capitals"
PIECE = 7
"""Characters of a piece of the stream."""


class Canned:
    """Answers by question; what was asked is kept in `asked`, and streams that ended early are counted in `cut`.

    A question that has no answer is echoed. `endless` streams until it is cut off; a number is a status to refuse with.
    """

    def __init__(self, answers: dict[str, str], run: RunDir | None, *, seconds_a_piece: float = 0) -> None:
        self._answers, self._seconds_a_piece = answers, seconds_a_piece
        self.asked: list[dict[str, Any]] = []
        self.cut = 0
        routes = [Route("/v1/models", self._models), Route("/v1/chat/completions", self._complete, methods=["POST"])]
        self.app = Starlette(routes=[*routes, *page_routes(run)])

    async def _models(self, request: Request) -> Response:
        made = [{"id": BASE, "object": "model", "parent": None}, {"id": ADAPTER, "object": "model", "parent": BASE}]
        return JSONResponse({"object": "list", "data": made})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question.isdigit():
            tried = "; try: a smaller max_tokens" if question == "400" else ""
            error = {"error": {"message": f"refused: {question}{tried}", "type": "invalid_request_error"}}
            return JSONResponse(error, status_code=int(question), headers={"Retry-After": "3"})
        return StreamingResponse(self._stream(question, body["model"]), media_type="text/event-stream")

    async def _stream(self, question: str, model: str) -> AsyncIterator[str]:
        if question == "endless":
            try:
                while True:
                    yield _event({"choices": [{"delta": {"content": "on "}}]})
                    await anyio.sleep(0.02)
            finally:
                self.cut += 1
        text = self._answers.get(f"{model}: {question}") or self._answers.get(question) or f"{model} says {question}"
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        for piece in pieces:
            yield _event({"choices": [{"delta": {"content": piece}}]})
            await anyio.sleep(self._seconds_a_piece)
        yield _event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": len(pieces)}})
        yield "data: [DONE]\n\n"


def _event(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def serving(canned: Canned) -> Iterator[str]:
    """The address of the page, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(canned.app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
