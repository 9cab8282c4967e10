"""How are the tokens of an answer chosen, and when does an answer end?"""

from typing import Annotated

import msgspec
from msgspec import Meta

from qdist.core.spec.sections import Count, Positive

MOST_STOPS = 16
MOST_LOGPROBS = 20
_HALF = 2**63
"""Seeds are from -2**63 to 2**63 - 1, and begin again behind that."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chooses the tokens of one answer. The default is greedy."""

    max_new_tokens: Annotated[Positive, Meta(description="Tokens of an answer, at most.")] = 256
    temperature: Annotated[
        float, Meta(ge=0, le=100, description="Logits are divided by it before a draw; 0: the likeliest token.")
    ] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1, description="Draw from the likeliest tokens of this sum.")] = 1.0
    top_k: Annotated[Count, Meta(description="Draw from this many of the likeliest tokens; 0: from all.")] = 0
    min_p: Annotated[
        float, Meta(ge=0, le=1, description="Drop tokens less likely than this part of the likeliest.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Meta(gt=0, le=10, description="Positive logits of tokens seen are divided by it, others multiplied.")
    ] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Taken from the logit of each token that the answer has already (as OpenAI defines it)."""
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """The same, times the number of times that it has it."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="Seed of the draws.")] = 0
    """The draw of a token is a function of the seed and of its place in the answer, whatever else is in the batch."""
    stop: Annotated[
        tuple[str, ...],
        Meta(max_length=MOST_STOPS, description="Text before which an answer ends; \\n: the end of a line."),
    ] = ()
    logprobs: Annotated[int, Meta(ge=-1, le=MOST_LOGPROBS)] = -1
    """Likeliest tokens to report at each place beside the chosen one's log-probability; -1: report none."""
    ignore_end: bool = False
    """Whether to go on to `max_new_tokens` past tokens that end a turn: to measure speed."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def again(self, number: int) -> "Sampling":
        """The same for another answer to one prompt: with the seed that is `number` higher."""
        return msgspec.structs.replace(self, seed=(self.seed + number + _HALF) % (2 * _HALF) - _HALF)
