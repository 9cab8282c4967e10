"""Asks a model behind an address, in OpenAI's protocol, and bears with servers that are busy."""

from collections.abc import Callable, Mapping
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple

import httpx

from qdist.core.errors import JobError, MachineError, QdistError, SpecError
from qdist.core.text import quoted

KEY = "OPENAI_API_KEY"
"""The environment variable with the key. It is neither written nor shown anywhere."""
_BUSY = (408, 409, 429, 500, 502, 503, 504, 529)
"""Statuses with which a server says to come again."""
_ATTEMPTS = 7
_LONGEST_PAUSE_S = 60.0
_TIMEOUT_S = 180.0
"""Without a byte; a verdict of a thousand tokens may take two minutes."""
_SHOWN = 300
"""Characters of a refusal that are shown."""


class Said(NamedTuple):
    """An answer."""

    text: str
    tokens: int
    """Of prompt and answer, by the server's count; a quarter of the characters where it does not count."""


class Endpoint:
    """A context around a model behind an address, which several threads may ask."""

    def __init__(
        self, url: str, model: str, *, key: str = "", timeout_s: float = _TIMEOUT_S,
        pause: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        """url: to /v1. pause: waits so many seconds before another attempt, in place of a clock."""
        self._url, self._model, self._key = f"{url.rstrip('/')}/chat/completions", model, key
        self._stopped = Event()
        self._pause = pause or self._stopped.wait
        self._settings: dict[str, Any] = {"temperature": 0}
        self._limit = "max_tokens"
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            self._client = httpx.Client(headers=headers, timeout=timeout_s)
        except (UnicodeEncodeError, httpx.InvalidURL) as error:
            raise MachineError(f"{KEY} or a proxy's address holds what HTTP cannot send") from error

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def stop(self) -> None:
        """End the waiting of all threads: no attempt follows the one at work."""
        self._stopped.set()

    def ask(self, system: str, text: str, *, max_new_tokens: int) -> Said:
        """The answer, the likeliest one where the model lets itself be asked for that.

        Raises MachineError for a key that is refused, SpecError for an address or model that is not there, JobError
        for one that stays busy or answers otherwise than the protocol says.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        why = ""
        for attempt in range(_ATTEMPTS):
            sent = {"model": self._model, "messages": messages, self._limit: max_new_tokens, **self._settings}
            outcome = self._attempt(sent)
            if isinstance(outcome, Said):
                return outcome
            why, wait_s = outcome
            if attempt + 1 < _ATTEMPTS and wait_s is not None:
                self._pause(min(_LONGEST_PAUSE_S, max(wait_s, 2.0**attempt)))
            if self._stopped.is_set():
                break
        raise JobError(
            f"the judge at {self._url} did not answer in {_ATTEMPTS} attempts: {why}",
            try_="the same command later, which goes on from the verdicts that are written",
        )

    def _attempt(self, sent: Mapping[str, Any]) -> Said | tuple[str, float | None]:
        """The answer; or why there is none yet, and the least seconds to wait, None for going on at once."""
        try:
            response = self._client.post(self._url, json=sent)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise SpecError(f"{self._url} is not an address", try_="--judge-url http://HOST:PORT/v1") from error
        except httpx.TransportError as error:
            return str(error) or type(error).__name__, 0.0
        if response.status_code == 200:
            return self._read(response, sent)
        why = self._shown(response)
        if response.status_code in _BUSY:
            return why, _stated_wait(response.headers)
        if self._adapts_to(response, sent):
            return why, None
        raise self._refusal(response.status_code, why)

    def _adapts_to(self, response: httpx.Response, sent: Mapping[str, Any]) -> bool:
        """Whether the model refused a setting that there is another way with: OpenAI's reasoning models do."""
        if response.status_code != 400:
            return False
        if "max_completion_tokens" in response.text and "max_tokens" in sent:
            self._limit = "max_completion_tokens"
            return True
        if "temperature" in response.text and "temperature" in sent:
            self._settings = {}
            return True
        return False

    def _refusal(self, status: int, why: str) -> QdistError:
        if status in (401, 403):
            return MachineError(f"the judge refuses the key ({status}): {why}", try_=f"{KEY}=... in the environment")
        if status == 404:
            return SpecError(
                f"{self._url} has no model {self._model!r}: {why}",
                try_=quoted("curl", self._url.replace("chat/completions", "models")),
            )
        return JobError(f"the judge at {self._url} refuses ({status}): {why}", try_="another --judge-model")

    def _read(self, response: httpx.Response, sent: Mapping[str, Any]) -> Said:
        try:
            answer = response.json()
            text = str(answer["choices"][0]["message"]["content"] or "")
            counted = (answer.get("usage") or {}).get("total_tokens")
            return Said(text, int(counted or (len(str(sent["messages"])) + len(text)) // 4))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = self._shown(response)
            raise JobError(
                f"what {self._url} answers is not OpenAI's protocol: {shown}", try_="--judge-url with /v1 at its end"
            ) from error

    def _shown(self, response: httpx.Response) -> str:
        """The beginning of what a server answered; some quote the key."""
        text = " ".join(response.text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN] or f"status {response.status_code}"


def _stated_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a busy server asks to wait; 0 if it does not, or names a date."""
    stated = headers.get("retry-after", "")
    return float(stated) if stated.replace(".", "", 1).isdecimal() else 0.0
