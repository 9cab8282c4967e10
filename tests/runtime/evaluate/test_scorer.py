"""Items in batches, and their answers from one process."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import JobError
from qdist.core.evaluation.scoring import Item, Scored, continuation
from qdist.runtime.engine.objective import Batch, CameTo, Passes, unseen
from qdist.runtime.engine.torch import Comm
from qdist.runtime.evaluate.scorer import PlacedScorer, batches_of, collate_items, positions_of
from qdist.runtime.placements.registry import placement_of
from tests.plans import gpus, planned
from tests.runtime.tiny import plan_of, save_config, tiny_model

CPU = torch.device("cpu")


def item_of(length: int, positions: tuple[int, ...], *, seed: int = 0) -> Item:
    tokens = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Item(tuple(tokens), positions, tuple(7 + position for position in positions))


ITEMS = [item_of(3 + 5 * (number % 4), (0, 2, 2), seed=number) for number in range(9)] + [item_of(30, (29,), seed=99)]


def test_items_of_like_length_share_a_batch_of_a_bounded_size() -> None:
    batches = batches_of(ITEMS, 40)
    assert sorted(index for batch in batches for index in batch) == list(range(len(ITEMS)))
    for batch in batches:
        widths = [len(ITEMS[index].tokens) for index in batch]
        assert len(batch) * max(widths) <= 40
        assert widths == sorted(widths, reverse=True)
    assert batches_of([ITEMS[-1]], 8) == [[0]], "an item longer than a batch has one of its own"
    assert batches_of([], 8) == []


@pytest.mark.parametrize(("micro_batch", "positions"), [(1, 2048), (4, 8192), (16, 16384)])
def test_a_batch_has_no_more_positions_than_the_plan_found_room_for(micro_batch: int, positions: int) -> None:
    settings = {"micro_batch": micro_batch, "global_batch": micro_batch, "seq_len": 2048}
    assert positions_of(planned("llama-7b", gpus(1, 80), settings)) == positions


def test_positions_count_through_the_padded_rows() -> None:
    batch = collate_items([Item((5, 6, 7), (1, 1), (8, 9)), Item((4,), (0,), (3,))], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [4, 2, 2]]
    assert batch["picked"].tolist() == [1, 1, 3]
    assert batch["targets"].tolist() == [8, 9, 3]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def scorer_of(model: Any, folder: Path, positions: int) -> PlacedScorer:
    plan = plan_of(save_config(folder / "model"), folder / "run")
    score = Passes(model, dtype=torch.float32).score
    return PlacedScorer(score, placement_of(plan, 0, (CPU,)), Comm(CPU), longest=64, pad_id=0, positions=positions)


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_answers_that_are_no_numbers_have_no_figure(tmp_path: Path, wrong: float) -> None:
    def score(batches: Iterable[Batch], came_to: CameTo) -> list[torch.Tensor]:
        return [torch.tensor([[-1.0, 1.0], [wrong, 0.0], [-2.0, 0.0]]) for _ in batches]

    place = placement_of(plan_of(save_config(tmp_path / "model"), tmp_path / "run"), 0, (CPU,))
    scorer = PlacedScorer(score, place, Comm(CPU), longest=64, pad_id=0)
    with pytest.raises(JobError, match="the model's answers to 1 of 1 items are NaN or infinite"):
        scorer.score(ITEMS[:1], unseen)


@pytest.mark.parametrize("positions", [1, 40, 4096])
def test_answers_are_those_of_a_plain_loop_whatever_the_batches(model: Any, tmp_path: Path, positions: int) -> None:
    counts: list[int] = []
    found = scorer_of(model, tmp_path, positions).score(ITEMS, counts.append)
    for item, scored in zip(ITEMS, found, strict=True):
        assert scored == near(plain(model, item))
    assert counts == sorted(counts)
    assert counts[-1] == len(ITEMS)


def plain(model: Any, item: Item) -> Scored:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.tokens])).logits[0].float()
    logs = logits.log_softmax(-1)
    pairs = list(zip(item.positions, item.targets, strict=True))
    greedy = tuple(int(logits[position].argmax()) == target for position, target in pairs)
    return Scored(tuple(float(logs[position, target]) for position, target in pairs), greedy)


def near(scored: Scored) -> Any:
    return Scored(pytest.approx(scored.logprobs, abs=1e-5), scored.greedy)


def test_the_most_probable_token_is_greedy(model: Any, tmp_path: Path) -> None:
    item = ITEMS[0]
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([item.tokens])).logits[0, 2].argmax())
    asked = Item(item.tokens, (2, 2), (best, best - 1))
    assert scorer_of(model, tmp_path, 64).score([asked], lambda count: None)[0].greedy == (True, False)


def test_many_positions_give_the_same_in_chunks(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [continuation(item_of(20, ()).tokens, item_of(10, (), seed=3).tokens, longest=64)]
    scorer = scorer_of(model, tmp_path, 64)
    (whole,) = scorer.score(items, lambda count: None)
    monkeypatch.setattr("qdist.runtime.engine.objective._AT_A_TIME", 3)
    assert scorer.score(items, lambda count: None) == [near(whole)]


def test_a_task_without_items_asks_for_nothing(model: Any, tmp_path: Path) -> None:
    assert scorer_of(model, tmp_path, 64).score([], lambda count: None) == []
