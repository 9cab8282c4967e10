"""What do the commands, the server and the page ask of that which answers?"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from qdist.core.errors import QdistError
from qdist.core.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: an end of turn or a stop text; `max_new_tokens` or the model's positions; `cancel`; an error
that is this answer's alone."""


class Question(NamedTuple):
    """A prompt and how to answer it."""

    prompt: Sequence[int]
    """Token ids; at least one, and fewer than the answerer's positions."""
    sampling: Sampling = Sampling()
    adapter: str = ""
    """Name of the adapter that answers; empty for the base alone."""


class Likely(NamedTuple):
    """A token that might have been chosen."""

    token: int
    text: str
    logprob: float


class Piece(NamedTuple):
    """What one token of an answer brought."""

    token: int
    text: str
    """Text that is now certain: empty while a character is incomplete or the text may begin a stop text."""
    logprob: float | None = None
    """Natural logarithm of its probability before sampling settings; None if not asked for."""
    likely: tuple[Likely, ...] = ()
    """The likeliest tokens, as many as were asked for."""


class Ended(NamedTuple):
    """How an answer ended; the last that is heard of it."""

    reason: Reason
    text: str
    """Text that was held back, without the stop text."""
    prompt_tokens: int
    new_tokens: int
    error: QdistError | None = None
    """Why no more can be answered, if the reason is an error: JobError for logits that are NaN, naming the token's
    place; DataError for a question that cannot be answered."""


Listener = Callable[[Piece | Ended], None]
"""Told of each token as it comes, on the thread that calls `step`. It must not block, and not raise."""


class Answerer(Protocol):
    """A model that answers several questions at once. Not for several threads: `Runner` is."""

    adapters: tuple[str, ...]
    """Names of the adapters; questions may name them, or none for the base."""
    slots: int
    """Answers that are worked on at a time; others wait in line."""
    positions: int
    """Tokens of a prompt and its answer together, at most."""

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question into the line; returns its ticket. Raises DataError for one that cannot be answered."""

    def cancel(self, ticket: int) -> None:
        """End an answer, in the line or at work; `Ended("cancelled")` is told. Nothing if it has ended."""

    def step(self) -> bool:
        """Let in whom there is a slot for, and bring each answer at work one token on. False if there was none.

        What is wrong with one answer ends that one; see `Ended.error`.
        """

    @property
    def working(self) -> int:
        """Answers at work."""

    @property
    def waiting(self) -> int:
        """Questions in the line."""
