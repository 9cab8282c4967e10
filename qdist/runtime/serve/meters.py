"""What does a server count, and how does Prometheus read it?"""

import time
from collections import Counter

from qdist.core.telemetry.prometheus import Metric, Sample, one, text_of

_USUAL_ANSWER_S = 5.0
"""Seconds that an answer is taken to need before one has been given."""
_NEWEST = 0.1
"""Weight of the newest answer in the mean duration."""


class Timer:
    """Times one answer: to its first token, and from there to its last."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._first = self._last = 0.0
        self.tokens = 0

    def token(self) -> None:
        """Note a token."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.tokens += 1

    @property
    def first_s(self) -> float | None:
        """Seconds from the request to the first token, the wait in line included; None if there was none."""
        return self._first - self._begun if self._first else None

    @property
    def rest_s(self) -> float:
        """Seconds from the first token to the last."""
        return self._last - self._first

    @property
    def whole_s(self) -> float:
        """Seconds from the first token to now: what a slot was taken for."""
        return time.monotonic() - self._first if self._first else 0.0


class Meters:
    """Sums over all requests since the start; of the event loop's thread alone."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens_in = self._tokens_out = self._answers = self._later_tokens = 0
        self._first_s = self._later_s = 0.0
        self._answer_s = _USUAL_ANSWER_S

    def request(self, path: str, status: int) -> None:
        """Count a request by what it was answered with."""
        self._requests[path, status] += 1

    def prompt(self, tokens: int) -> None:
        """Count a prompt's tokens."""
        self._tokens_in += tokens

    def answer(self, timer: Timer) -> None:
        """Count an answer that has ended."""
        self._tokens_out += timer.tokens
        if timer.first_s is None:
            return
        self._answers += 1
        self._first_s += timer.first_s
        self._later_tokens += timer.tokens - 1
        self._later_s += timer.rest_s
        self._answer_s += _NEWEST * (timer.whole_s - self._answer_s)

    def wait_s(self, ahead: int, slots: int) -> float:
        """Seconds until that many answers have ended, at the mean duration of the last ones."""
        return min(max(1.0, self._answer_s * ahead / slots), 600.0)

    def text(self, *, working: int, waiting: int) -> str:
        """The figures in Prometheus' text format."""
        counted: list[Sample] = [
            ({"path": path, "status": status}, float(n)) for (path, status), n in sorted(self._requests.items())
        ]
        metrics = (
            Metric("qdist_serve_requests_total", "counter", "Requests by path and HTTP status.", counted),
            one("qdist_serve_answers_working", "Answers at work.", working),
            one("qdist_serve_answers_waiting", "Questions in the line.", waiting),
            _total("prompt_tokens", "Tokens of prompts.", self._tokens_in),
            _total("answer_tokens", "Tokens of answers.", self._tokens_out),
            _total("answers", "Answers with at least one token.", self._answers),
            _total("first_token_seconds", "From request to first token, summed over answers.", self._first_s),
            _total("later_token_seconds", "From first token to last, summed over answers.", self._later_s),
            _total("later_tokens", "Tokens after the first of each answer.", self._later_tokens),
        )
        return text_of(metrics, {})


def _total(name: str, meaning: str, value: float) -> Metric:
    return one(f"qdist_serve_{name}_total", meaning, value, "counter")
