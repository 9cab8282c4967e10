"""Is the hint that a refusal ends with the smallest change that works?"""

from collections.abc import Callable
from typing import Any

import pytest

from qdist.core.errors import Change, QdistError, SpecError, flags, in_words, typed
from qdist.core.spec.suggest import TooBigError, or_tried_hint

Rules = Callable[[dict[str, Any]], QdistError | None]
NOW = {"gpus": 4, "micro_batch": 3, "placement": None, "bits": 16}


def hint(rules: Rules) -> tuple[str, list[Change]]:
    """What is suggested under rules that settings have to keep, and all that was tried."""
    tried: list[Change] = []

    def attempt(change: Change) -> str:
        tried.append(change)
        if error := rules({**NOW, **change}):
            raise error
        return "made"

    with pytest.raises(QdistError) as caught:
        or_tried_hint(attempt, NOW, remark=lambda made: f"so it is {made}")
    return caught.value.try_, tried


def test_what_is_asked_is_made_where_it_can_be() -> None:
    assert or_tried_hint(lambda change: dict(change), NOW) == {}


def test_a_way_that_leads_to_another_refusal_is_not_shown() -> None:
    ways: list[Change] = [{"gpus": 3}, {"gpus": 2}]
    try_, tried = hint(lambda now: None if now["gpus"] == 2 else SpecError(f"{now['gpus']}", ways=ways))
    assert try_ == "--gpus 2"
    assert tried == [{}, {"gpus": 3}, {"gpus": 2}]


def test_contradictions_are_settled_together() -> None:
    def rules(now: dict[str, Any]) -> QdistError | None:
        if now["micro_batch"] == 3:
            return SpecError("does not divide", ways=[{"micro_batch": 2}])
        return SpecError("too wide", ways=[{"bits": 4}]) if now["bits"] > 4 else None

    assert hint(rules)[0] == "--set micro_batch=2 --bits 4"


def test_what_turns_out_to_be_needless_is_left_out() -> None:
    def rules(now: dict[str, Any]) -> QdistError | None:
        if now["gpus"] == 2:
            return None
        first = SpecError("first", ways=[{"micro_batch": 2}])
        return first if now["micro_batch"] == 3 else SpecError("second", ways=[{"gpus": 2}])

    assert hint(rules)[0] == "--gpus 2"


def test_what_is_so_already_is_no_change() -> None:
    ways: list[Change] = [{"placement": None, "bits": "16"}, {"placement": None, "bits": 8}]
    try_, tried = hint(lambda now: None if now["bits"] == 8 else SpecError("", ways=ways))
    assert (try_, tried) == ("--bits 8", [{}, {"bits": 8}])


def test_of_the_ways_to_fit_one_is_taken_and_of_it_what_is_needed() -> None:
    ways: list[Change] = [{"micro_batch": 1}, {"micro_batch": 1, "bits": 8, "gpus": 8}]
    try_, tried = hint(lambda now: None if now["gpus"] == 8 else TooBigError("too big", ways=ways))
    assert try_ == "--gpus 8 (so it is made)"
    assert {"micro_batch": 1} in tried


def test_where_nothing_fits_a_settled_contradiction_is_better_than_nothing() -> None:
    contradiction = SpecError("contradiction", ways=[{"micro_batch": 2}])
    too_big = TooBigError("too big", ways=[{"bits": 4}])
    assert hint(lambda now: contradiction if now["micro_batch"] == 3 else too_big)[0] == "--set micro_batch=2"
    assert hint(lambda _: too_big)[0] == "a smaller model, or larger GPUs"


def test_refusals_that_lead_to_each_other_end() -> None:
    def rules(now: dict[str, Any]) -> QdistError:
        return SpecError(f"{now['gpus']}", ways=[{"gpus": now["gpus"] + 1}, {"gpus": now["gpus"] - 1}])

    try_, tried = hint(rules)
    assert try_ == "--gpus 5"
    assert len(tried) < 1000


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bits", 4, "--bits 4"), ("gpus_per_group", None, "--gpus-per-group auto"),
        ("method", "qlora", "--method qlora"), ("lora.r", 16, "--set lora.r=16"), ("liger", False, "--set liger=false"),
        ("gpu_name", "RTX 4090", "--gpu-name 'RTX 4090'"), ("new_tokens", ["<a b>"], "--set 'new_tokens=<a b>'"),
        ("lora.targets", ("q_proj", "v_proj"), "--set lora.targets=q_proj,v_proj"),
    ],
)  # fmt: skip
def test_a_setting_is_written_as_a_shell_takes_it(key: str, value: object, text: str) -> None:
    assert typed(key, value) == text


def test_a_machine_is_typed_or_told() -> None:
    change = {"gpu_memory": "48GiB", "bits": 4}
    assert flags(change) == "--gpu-memory 48GiB --bits 4"
    assert in_words(change) == "GPUs of 48 GiB with --bits 4"
    assert in_words({"host_memory": "64GiB"}) == "64 GiB of host memory, which qdist plan --host-memory 64GiB assumes"
