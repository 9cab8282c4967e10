"""Each answer's tokens are chosen by its own settings, alone or in a batch, as transformers' processors would."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process

from qdist.core.sampling import MOST_LOGPROBS, Sampling
from qdist.runtime.infer.choosing import Chooser, Level, Variant, filtered, level_of, penalized

VOCAB = 97
CPU = torch.device("cpu")


def logits_of(rows: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def chooser_of(*samplings: Sampling, vocab: int = VOCAB) -> Chooser:
    chooser = Chooser(len(samplings), vocab, CPU)
    for row, sampling in enumerate(samplings):
        chooser.admit(row, sampling, [1, 2])
    chooser.use(samplings)
    return chooser


def chosen(chooser: Chooser, logits: torch.Tensor, *rows: int) -> list[int]:
    tokens: list[int] = chooser(logits, torch.tensor(rows)).tolist()
    return tokens


@pytest.mark.parametrize("top_k", [1, 5, 96, 97, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_what_may_be_drawn_is_what_transformers_leaves(top_k: int, top_p: float, min_p: float) -> None:
    scores, ids = logits_of(8), torch.zeros(8, 1, dtype=torch.int64)
    wanted = logits_process.TopKLogitsWarper(top_k)(ids, scores.clone())
    wanted = logits_process.TopPLogitsWarper(top_p)(ids, wanted)
    wanted = logits_process.MinPLogitsWarper(min_p)(ids, wanted)
    settings = (torch.full((8, 1), value) for value in (top_k, top_p, min_p))
    assert torch.equal(filtered(scores, *settings), wanted)


def test_settings_of_rows_are_their_own() -> None:
    left = filtered(
        logits_of(3), torch.tensor([[2], [97], [5]]), torch.tensor([[1.0], [1.0], [0.01]]), torch.zeros(3, 1)
    )
    assert left.isfinite().sum(-1).tolist() == [2, 97, 1]


def test_tokens_that_tie_at_the_border_all_stay() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for top_k, top_p in ((2, 1.0), (5, 0.6)):
        left = filtered(scores, torch.tensor([[top_k]]), torch.tensor([[top_p]]), torch.zeros(1, 1))
        assert left.isfinite().tolist() == [[False, True, True, True, False]]


def test_penalties_are_transformers_and_openais() -> None:
    logits, written, prompted = logits_of(1), torch.zeros(1, VOCAB, dtype=torch.int32), torch.zeros(1, VOCAB).bool()
    prompted[0, [3, 4]] = True
    written[0, 4], written[0, 7] = 1, 3
    wanted = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 4, 7, 7, 7]]), logits.clone())
    wanted[0, [4, 7]] -= 0.5
    wanted[0, [4, 7]] -= torch.tensor([0.25, 0.75])
    assert torch.allclose(penalized(logits, written, prompted, torch.tensor([[1.3, 0.5, 0.25]])), wanted)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_p=0.5), Sampling(top_k=2, repetition_penalty=1.5)])
def test_rows_that_hold_no_answer_are_computed_harmlessly(sampling: Sampling) -> None:
    chooser, logits = Chooser(4, VOCAB, CPU), logits_of(4)
    chooser.admit(0, sampling, [1, 2])
    chooser.use([sampling])
    among = chosen(chooser, logits, 0, 1, 2, 3)
    assert among[:1] == chosen(chooser_of(sampling), logits[:1], 0)
    assert all(0 <= token < VOCAB for token in among)


def test_a_greedy_answer_among_others_takes_the_likeliest() -> None:
    logits = logits_of(3)
    chooser = chooser_of(Sampling(), Sampling(temperature=2.0, seed=4), Sampling(top_k=3, min_p=0.5))
    assert chooser.variant == Variant(Level.DRAWN)
    tokens = chosen(chooser, logits, 0, 1, 2)
    assert [tokens[0], tokens[2]] == logits.argmax(-1)[[0, 2]].tolist()


def test_draws_depend_on_seed_and_place_and_on_nothing_beside() -> None:
    own = Sampling(temperature=1.0, seed=-(2**40) + 5)
    others = (Sampling(temperature=0.7, top_k=3, seed=9), Sampling(repetition_penalty=1.2), own)
    alone, among = chooser_of(own), chooser_of(*others)
    first, second = list[int](), list[int]()
    for place in range(20):
        logits = logits_of(3, seed=place)
        first += chosen(alone, logits[2:], 0)
        second.append(chosen(among, logits, 0, 1, 2)[2])
        if place == 10:
            among.move(2, 0)
            among.move(0, 2)
    assert first == second
    flat = torch.zeros(1, VOCAB)
    drawn = {tuple(chosen(chooser_of(Sampling(temperature=1.0, seed=seed)), flat, 0)) for seed in range(40)}
    assert len(drawn) > 20


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    chooser = chooser_of(Sampling(temperature=1.0, seed=3), vocab=4)
    counts = Counter(chosen(chooser, logits, 0)[0] for _ in range(4000))
    for token, share in enumerate(logits.softmax(-1)[0].tolist()):
        assert abs(counts[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_seeds_draw_independently_at_one_place() -> None:
    """Of uniform logits: no token is favoured over many seeds."""
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(4000)]
    counts = Counter(chosen(chooser_of(*samplings, vocab=8), torch.zeros(4000, 8), *range(4000)))
    assert all(400 < counts[token] < 600 for token in range(8))


def test_a_token_is_penalized_from_its_first_time_on() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5] = 0.5
    chooser = chooser_of(Sampling(presence_penalty=1.0), vocab=8)
    assert chosen(chooser, logits, 0) == [5]
    assert chosen(chooser, logits, 0) != [5]
    chooser.admit(0, Sampling(presence_penalty=1.0), [5])
    assert chosen(chooser, logits, 0) == [5], "the prompt's tokens are not the answer's"


def test_log_probabilities_are_the_models_own() -> None:
    logits, sampling = logits_of(2), Sampling(temperature=0.5, top_k=2, logprobs=3)
    chooser = chooser_of(sampling, Sampling())
    tokens = chosen(chooser, logits, 0, 1)
    wanted = logits.log_softmax(-1)
    for row, choice in enumerate(chooser.read(2)):
        assert (choice.token, choice.is_finite) == (tokens[row], True)
        assert choice.logprob == wanted[row, tokens[row]]
        assert [token for token, _ in choice.likely] == wanted[row].topk(MOST_LOGPROBS).indices.tolist()
        assert [value for _, value in choice.likely] == wanted[row].topk(MOST_LOGPROBS).values.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_flagged_in_their_row(bad: float) -> None:
    logits = logits_of(2)
    logits[1, 5] = bad
    chooser = chooser_of(Sampling(), Sampling(temperature=1.0, top_p=0.5))
    chosen(chooser, logits, 0, 1)
    assert [choice.is_finite for choice in chooser.read(2)] == [True, False]


@pytest.mark.parametrize(
    ("sampling", "level"),
    [
        (Sampling(top_p=0.5), Level.GREEDY),
        (Sampling(temperature=1.0), Level.DRAWN),
        (Sampling(temperature=1.0, min_p=0.1), Level.FILTERED),
        (Sampling(frequency_penalty=-0.1), Level.PENALIZED),
    ],
)
def test_no_more_is_computed_than_an_answer_needs(sampling: Sampling, level: Level) -> None:
    assert level_of(sampling) == level
