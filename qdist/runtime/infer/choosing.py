"""Chooses the next token of each answer on the device, each by its own settings; a graph may capture it.

Settings apply in this order: repetition, presence and frequency penalty, temperature, top-k, top-p, min-p. Each reads
what the one before left, as in transformers; of tokens that tie at the border all stay. What is left is drawn from by
the largest of logit + Gumbel noise, whose random bits are a function of the answer's seed, the place in the answer and
the token: the same alone and in a batch, on a CPU and a GPU, and not thrown off by a rounding of other tokens.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from qdist.core.sampling import MOST_LOGPROBS, Sampling
from qdist.runtime.kernels.hashing import as_int32, mixed

_COLDEST = 1e-6
"""Lowest temperature that logits are divided by: lower ones would make infinities of them."""
_TOKEN, _FINITE, _LOGPROB, _LIKELY = 0, 1, 2, 3
"""Columns of `Chooser.results`; tokens of the likeliest from the last on, and then their log-probabilities."""


class Level(IntEnum):
    """How much must be computed; each does all that the ones before do."""

    GREEDY = 0
    DRAWN = 1
    FILTERED = 2
    PENALIZED = 3


class Variant(NamedTuple):
    """What a pass computes for all its rows: a graph is captured for each."""

    level: Level = Level.GREEDY
    logprobs: bool = False


class Choice(NamedTuple):
    """A token that was chosen, on the host."""

    token: int
    is_finite: bool
    """Whether the largest logit was a number: NaN or infinite logits choose nothing."""
    logprob: float = 0.0
    """Before settings; set if the variant has log-probabilities, as `likely` is."""
    likely: tuple[tuple[int, float], ...] = ()
    """The `MOST_LOGPROBS` likeliest tokens with their log-probabilities, the likeliest first."""


class Chooser:
    """Settings and counters of `slots` answers on a device; called with logits, returns the next tokens.

    slots: rows. vocab: tokens that have a logit.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.variant = Variant()
        """What calls compute; `use` sets it."""
        self.results = torch.zeros(slots, _LIKELY + 2 * MOST_LOGPROBS, dtype=torch.int32, device=device)
        """What calls chose, a row an answer; log-probabilities as the bits of float32."""
        self._slots, self._vocab = slots, vocab
        self._floats = torch.zeros(slots, 6, device=device)
        self._integers = torch.zeros(slots, 3, dtype=torch.int64, device=device)
        self._tokens = mixed(torch.arange(vocab, dtype=torch.int32, device=device))
        self._written: torch.Tensor | None = None
        """Times that an answer has each token, int32 [slots, vocab]; None until an answer has penalties."""
        self._prompted: torch.Tensor | None = None
        """Which tokens the prompt has, bool [slots, vocab]."""

    def admit(self, row: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Give a row to a new answer, which is at its first place."""
        device = self._floats.device
        floats = (
            sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty,
            sampling.presence_penalty, sampling.frequency_penalty,
        )  # fmt: skip
        self._floats[row] = torch.tensor(floats, device=device)
        self._integers[row] = torch.tensor((sampling.top_k or self._vocab, sampling.seed, 0), device=device)
        if level_of(sampling) == Level.PENALIZED:
            written, prompted = self._seen()
            written[row] = 0
            prompted[row] = False
            prompted[row, torch.tensor(sorted(set(prompt)), device=device)] = True

    def use(self, samplings: Iterable[Sampling]) -> None:
        """Compute what these answers need, and no more, in calls from now on."""
        asked = list(samplings)
        level = max(map(level_of, asked), default=Level.GREEDY)
        self.variant = Variant(level, any(sampling.logprobs >= 0 for sampling in asked))

    def move(self, source: int, target: int) -> None:
        """Have an answer go on in another row."""
        for tensor in (self._floats, self._integers, self._written, self._prompted):
            if tensor is not None:
                tensor[target] = tensor[source]

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The next token of each row, int64 [n], and its place counted on.

        logits: float32 [n, vocab]. rows: int64 [n], each once.
        """
        (level, with_logprobs), found = self.variant, logits.max(-1)
        tokens = found.indices if level == Level.GREEDY else self._drawn(logits, rows, level)
        self._integers[:, 2].index_add_(0, rows, torch.ones_like(rows))
        columns = [tokens.to(torch.int32)[:, None], found.values.isfinite().to(torch.int32)[:, None]]
        if level == Level.PENALIZED:
            written, _ = self._seen()
            written[rows, tokens] = written[rows, tokens] + 1
        if with_logprobs:
            columns += _logprobs(logits, tokens)
        packed = torch.cat(columns, dim=1)
        self.results[:, : packed.shape[1]].index_copy_(0, rows, packed)
        return tokens

    def read(self, rows: int) -> list[Choice]:
        """What the last call for each of the rows 0 to rows - 1 chose: one copy from the device."""
        if not self.variant.logprobs:
            return [Choice(token, bool(finite)) for token, finite in self.results[:rows, :_LOGPROB].tolist()]
        host = self.results[:rows].cpu()
        logprobs = host.view(torch.float32)[:, [_LOGPROB, *range(_LIKELY + MOST_LOGPROBS, host.shape[1])]].tolist()
        return [
            Choice(row[_TOKEN], bool(row[_FINITE]), own[0], tuple(zip(row[_LIKELY:], own[1:], strict=False)))
            for row, own in zip(host.tolist(), logprobs, strict=True)
        ]

    def _drawn(self, logits: torch.Tensor, rows: torch.Tensor, level: Level) -> torch.Tensor:
        settings, (top_k, seed, place) = self._floats[rows], self._integers[rows].unbind(-1)
        temperature, top_p, min_p = (settings[:, column, None] for column in range(3))
        if level == Level.PENALIZED:
            written, prompted = self._seen()
            logits = penalized(logits, written[rows], prompted[rows], settings[:, 3:])
        scores = torch.where(temperature > 0, logits / temperature.clamp(min=_COLDEST), logits)
        if level >= Level.FILTERED:
            scores = filtered(scores, top_k[:, None], top_p, min_p)
        return torch.where(temperature > 0, scores + self._noise(seed, place), scores).argmax(-1)

    def _noise(self, seed: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Gumbel noise, float32 [n, vocab], of 23 random bits."""
        first = mixed(mixed(as_int32(seed)) ^ as_int32(place))
        key = mixed(as_int32(seed >> 32) ^ first)
        bits = (mixed(self._tokens ^ key[:, None]) >> 9) & 0x7FFFFF
        uniform = (bits.float() + 0.5) * 2.0**-23  # exact, and neither 0 nor 1
        return uniform.log_().neg_().log_().neg_()

    def _seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`_written` and `_prompted`: made once, and never again, since graphs know where they lie."""
        if self._written is None or self._prompted is None:
            shape, device = (self._slots, self._vocab), self._floats.device
            self._written = torch.zeros(shape, dtype=torch.int32, device=device)
            self._prompted = torch.zeros(shape, dtype=torch.bool, device=device)
        return self._written, self._prompted


def level_of(sampling: Sampling) -> Level:
    """What must be computed for an answer."""
    if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0):
        return Level.PENALIZED
    if sampling.is_greedy:
        return Level.GREEDY
    is_filtered = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    return Level.FILTERED if is_filtered else Level.DRAWN


def penalized(
    logits: torch.Tensor, written: torch.Tensor, prompted: torch.Tensor, penalties: torch.Tensor
) -> torch.Tensor:
    """Logits [n, vocab] after the penalties [n, 3]: repetition, presence, frequency.

    Repetition counts tokens of prompt and answer (as transformers and vLLM do), the others those of the answer.
    """
    repetition, presence, frequency = penalties[:, :, None].unbind(1)
    seen = prompted | (written > 0)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - presence * (written > 0) - frequency * written


def filtered(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Scores [n, vocab] with -inf for tokens that must not be drawn. Settings [n, 1]: 1 or more, above 0, 0 or more.

    Rows that hold no answer have zeros for settings, and must not point out of the vocabulary: CUDA would end for good.
    """
    ordered = scores.sort(-1, descending=True).values
    border = ordered.gather(-1, (top_k - 1).clamp(0, scores.shape[-1] - 1))
    shares = ordered.masked_fill(ordered < border, -torch.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    in_nucleus = (before < top_p) | (top_p >= 1)
    in_nucleus[:, 0] = True
    border = torch.maximum(border, ordered.masked_fill(~in_nucleus, torch.inf).amin(-1, keepdim=True))
    border = torch.maximum(border, ordered[:, :1] + min_p.log())
    return scores.masked_fill(scores < torch.minimum(border, ordered[:, :1]), -torch.inf)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Columns of `Chooser.results` from the chosen token's log-probability on."""
    found = logits.log_softmax(-1)
    likely = found.topk(min(MOST_LOGPROBS, logits.shape[-1]), dim=-1)
    spare = MOST_LOGPROBS - likely.values.shape[-1]
    tokens_of, values = (torch.nn.functional.pad(part, (0, spare)) for part in (likely.indices, likely.values))
    return [
        found.gather(-1, tokens[:, None]).view(torch.int32),
        tokens_of.to(torch.int32),
        values.contiguous().view(torch.int32),
    ]
