"""How is a request that is not answered refused, in the words and shape of OpenAI's API?"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from qdist.core.errors import QdistError

_LONGEST_VALUE = 80
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


class Refusal(QdistError):
    """Why a request is not answered: an HTTP status, one sentence, and one thing to do."""

    def __init__(
        self, message: str, *, try_: str = "", status: int = 400, field: str = "", code: str = "",
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        """field: path of the field that is wrong, such as `messages[0].content`. code: OpenAI's word for the case."""
        super().__init__(message, try_=try_)
        self.status, self.field, self.code, self.retry_after_s = status, field, code, retry_after_s

    def content(self) -> dict[str, Any]:
        """OpenAI's error object."""
        text = f"{self.message}; try: {self.try_}" if self.try_ else self.message
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": text, "type": kind, "param": self.field or None, "code": self.code or None}}

    def response(self) -> Response:
        """The answer that carries it."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.content(), status=self.status, headers=headers)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def shown(value: Any) -> str:
    """A value of a request in a few words, or as JSON if that is short."""
    match value:
        case dict():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value):,}" if value else "an empty list"
        case int() if value.bit_length() > 64:
            return "an integer of more than 64 bits"
        case str() if len(value) > _LONGEST_VALUE:
            return f"{shown(value[:_LONGEST_VALUE])} and so on"
    return msgspec.json.encode(value).decode()


def unfit(field: str, value: Any, what: str, *, try_: str = "") -> Refusal:
    """The refusal of a field's value. what: which values would do, such as `it is a number >= 0`."""
    return Refusal(f"{field} cannot be {shown(value)}: {what}", try_=try_, field=field)
