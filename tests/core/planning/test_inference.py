"""How much GPU memory does quantizing take? By what grows with what; measured peaks are in docs/decisions.md."""

from typing import Any

import msgspec
import pytest

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import LayerRun, ModelFacts
from qdist.core.planning.inference import Needs, needs
from qdist.core.text import GIB


def facts_of(alias: str) -> ModelFacts:
    return from_config(config_of(alias), name=alias)


def need(facts: ModelFacts, **changes: Any) -> Needs:
    given = {"batch": 4, "tokens": 2048, "hidden": 0, "lanes": 8, "number_bytes": 2, "first": True}
    return needs(facts, **{**given, **changes})


def test_a_65b_is_quantized_on_a_card_of_24_gib() -> None:
    assert need(facts_of("llama-65b")).total < 24 * GIB / 1.5


def test_the_fullest_moment_counts_and_what_stays_is_there_in_all_of_them() -> None:
    found = need(facts_of("llama-7b"), hidden=3)
    assert found.total == found.layer + 3 + found.running + found.summing
    assert found.factoring < found.running + found.summing
    alone = need(facts_of("llama-7b"), lanes=1)
    assert alone.total == alone.layer + alone.factoring
    assert found.layer == 2 * sum(linear.weights for linear in facts_of("llama-7b").linears)
    assert found.factoring > 5 * 4 * 11_008**2


def test_a_batch_takes_more_with_its_tokens_and_with_scores_that_are_written_out() -> None:
    llama = facts_of("llama-7b")
    assert need(llama, batch=8).running == 2 * need(llama).running
    (run,) = llama.layers
    written_out = msgspec.structs.replace(run.shape, attention="eager")
    eager = msgspec.structs.replace(llama, layers=(LayerRun(written_out, run.count),))
    scores = 4 * 2048 * 2048 * 32 * (2 * 2 + 2 * 4)
    assert need(eager).running > scores
    assert need(llama).running < scores


@pytest.mark.parametrize(("lanes", "sums"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 4)])
def test_sums_of_lanes_are_kept_as_digits_of_their_number(lanes: int, sums: int) -> None:
    llama = facts_of("llama-7b")
    found = [need(llama, lanes=count, first=False).summing for count in (1, lanes)]
    assert found[1] - found[0] == (sums - 1) * 4 * 11_008**2


def test_other_gpus_factor_nothing_and_solve_no_linear_that_reads_alone() -> None:
    llama = facts_of("llama-7b")
    other, first = need(llama, first=False), need(llama)
    assert other.factoring == 0
    assert other.solving < first.solving  # down_proj is solved on the first
