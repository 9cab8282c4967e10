"""How much GPU memory does quantizing take? By what grows with what; measured peaks are in docs/decisions.md."""

from typing import Any

import msgspec
import pytest

from qdist.core.facts import ModelFacts, from_config
from qdist.core.gptq_memory import Needs, needs
from qdist.core.models import config_of
from qdist.core.units import GIB


def facts_of(alias: str) -> ModelFacts:
    return from_config(config_of(alias), name=alias)


def need(facts: ModelFacts, **changes: Any) -> Needs:
    given = {"batch": 4, "tokens": 2048, "hidden": 0, "lanes": 8, "number_bytes": 2, "first": True}
    return needs(facts, **{**given, **changes})


def test_a_65b_is_quantized_on_a_card_of_24_gib() -> None:
    assert need(facts_of("llama-65b")).total < 24 * GIB / 1.5


def test_the_fullest_moment_counts_and_what_stays_is_there_in_all_of_them() -> None:
    found = need(facts_of("llama-7b"), hidden=3)
    assert found.total == found.layer + 3 + found.factoring
    assert found.layer == 2 * sum(linear.weights for linear in facts_of("llama-7b").linears)
    assert found.factoring > 5 * 4 * 11_008**2
    busy = need(facts_of("smollm2-135m"))
    assert busy.total == busy.layer + busy.running + busy.summing


def test_a_batch_takes_more_with_its_tokens_and_with_scores_that_are_written_out() -> None:
    llama = facts_of("llama-7b")
    assert need(llama, batch=8).running == 2 * need(llama).running
    eager = msgspec.structs.replace(llama, attention="eager")
    scores = 4 * 2048 * 2048 * 32 * (2 * 2 + 2 * 4)
    assert need(eager).running > scores
    assert need(llama).running < scores


@pytest.mark.parametrize("lanes", [1, 4])
def test_other_gpus_hold_a_sum_a_lane_and_factor_nothing(lanes: int) -> None:
    llama = facts_of("llama-7b")
    other, first = need(llama, lanes=lanes, first=False), need(llama, lanes=lanes)
    assert other.factoring == 0
    assert other.summing - first.summing == (lanes - min(2, lanes)) * 4 * 11_008**2
    assert other.solving < first.solving  # down_proj is solved on the first alone
