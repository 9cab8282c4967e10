"""Is a tensor named that got no gradient, and only then?"""

import math
from typing import Any

import pytest

from qdist.core.errors import JobError
from qdist.core.telemetry.gradients import Section, combine, judge, not_finite

ONE = Section("whole", 1)
A, B = (Section("experts", 4, "mlp.experts", side) for side in ("A", "B"))  # type: ignore[arg-type]


def test_a_matrix_a_has_its_first_gradient_in_the_second_update() -> None:
    found = judge({"A": ONE, "B": ONE}, [{"A": [0.0], "B": [1.0]}, {"A": [2.0], "B": [1.0]}])
    assert found.words == "finite and not zero in all 2 trained tensors"


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([{"B": [1.0]}, {"B": [1.0]}],
         "1 of 2 trained tensors have had no gradient in the first two updates: they are not part of the loss: A"),
        ([{"A": [0.0], "B": [1.0]}] * 2,
         "1 of 2 trained tensors have had a gradient of nothing but zeros in the first two updates: A"),
        ([{"A": [0.0], "B": [1.0]}, {"A": [math.nan], "B": [math.inf]}],
         "2 of 2 trained tensors have a gradient that is NaN or infinite: A, B"),
    ],
)  # fmt: skip
def test_a_tensor_without_a_gradient_is_named(updates: Any, words: str) -> None:
    with pytest.raises(JobError) as caught:
        judge({"A": ONE, "B": ONE}, updates)
    assert caught.value.message == words


def test_ranks_see_different_samples_and_a_nan_of_one_counts() -> None:
    assert combine([{"x": [0.0, 3.0]}, {"x": [2.0, 1.0], "y": [1.0]}]) == {"x": [2.0, 3.0], "y": [1.0]}
    for ranks in ([math.nan], [1.0]), ([1.0], [math.nan]):
        assert math.isnan(combine({"x": own} for own in ranks)["x"][0])


def test_rows_of_new_tokens_that_were_not_met_are_excepted_and_counted() -> None:
    update = {"rows": [0.0, 1.0, 0.0]}
    found = judge({"rows": Section("rows", 3)}, [update, {"rows": [0.0, 0.0, 0.0]}])
    assert (found.rows, found.idle_rows) == (3, 2)
    assert found.words.endswith("; 2 of 3 rows of new tokens saw no token (rows)")


def test_experts_that_no_token_came_to_are_excepted_counted_and_named() -> None:
    b, a = [1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]
    found = judge({"A": A, "B": B}, [{"A": [0.0] * 4, "B": b}, {"A": a, "B": b}])
    assert (found.experts, found.idle_experts, found.named) == (4, 2, ("mlp.experts 2, 3",))
    assert found.words.endswith("; 2 of 4 experts saw no token (mlp.experts 2, 3)")


def test_an_expert_that_had_tokens_must_have_gradients_in_all_its_matrices() -> None:
    """Expert 1 has tokens in both updates, as B shows, and nothing reaches its A."""
    b = [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(JobError, match=r"1 of 2 trained tensors have had .* zeros .*: A \(expert 1\)"):
        judge({"A": A, "B": B}, [{"A": [0.0] * 4, "B": b}, {"A": [1.0, 0.0, 0.0, 0.0], "B": b}])
    with pytest.raises(JobError, match=r": B2 \(expert 1\)"):
        judge({"B": B, "B2": B}, [{"B": b, "B2": [1.0, 0.0, 0.0, 0.0]}] * 2)


def test_an_expert_that_had_tokens_in_one_update_alone_may_lack_a_gradient_of_a() -> None:
    first, second = {"A": [0.0] * 4, "B": [1.0, 1.0, 0.0, 0.0]}, {"A": [1.0, 0, 0, 0], "B": [1.0, 0.0, 1.0, 0.0]}
    assert judge({"A": A, "B": B}, [first, second]).idle_experts == 1


def test_tensors_with_gradients_that_are_not_finite_follow_the_sentence() -> None:
    assert not_finite(("a", "b", "c", "d"), 9) == ", in 4 of 9 trained tensors: a, b, c and 1 more"
    assert not not_finite((), 9)
