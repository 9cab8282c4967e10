"""Data sets known by name have a place on the hub, and a format that their columns fit."""

import pytest

from qdist.core.data.named import NAMED


def test_the_eleven_names_of_the_predecessors_are_known() -> None:
    assert set(NAMED) == {
        "alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "oasst1", "vicuna",
        "evol-instruct", "dolly-15k", "olcc",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_a_repository_of_the_hub(name: str) -> None:
    owner, slash, repository = NAMED[name].hub.partition("/")
    assert all((owner, slash, repository))
    assert "/" not in repository
    assert NAMED[name].split == "train"
