"""Does an inventory add up over ranks, say what it found, and refuse what was left undone?"""

from typing import Any

import pytest

from qdist.core.errors import DataError, ModelError
from qdist.core.telemetry.inventory import (
    EMBEDDINGS,
    STORED,
    UNPACKED,
    Learned,
    Module,
    Part,
    lines_of,
    merged,
    rows_of,
    take_inventory,
)
from qdist.core.text import MIB

DATA = Learned(samples=1024, tokens=1000, learned_tokens=780, records=1027, none=3, whole=5)
PROJ = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def linear(path: str = PROJ, **changes: Any) -> Module:
    usual = {"bits": 4, "packing": "nf4", "whole_bytes": 2 * MIB, "is_targeted": True, "is_adapted": True}
    return Module(path, "linear", **(usual | changes))


def experts(path: str = EXPERTS, **changes: Any) -> Module:
    usual = {"bits": 4, "packing": "nf4", "whole_bytes": 8 * MIB}
    return Module(path, "expert", **(usual | changes))


ROUTER = Module("model.layers.0.mlp.gate.weight", "other", 16, reason="router", whole_bytes=MIB)
TABLE = Module("model.embed_tokens.weight", "other", 16, reason=EMBEDDINGS, whole_bytes=5 * MIB)


def taken(*modules: Module, **changes: Any) -> Any:
    usual: dict[str, Any] = {"bits": 4, "targets": ("all-linear",), "data": DATA, "kernels": ("attention sdpa",)}
    return take_inventory([Part(modules)], **(usual | changes))


def test_an_inventory_is_told_in_a_few_lines() -> None:
    found = taken(linear(), experts(), ROUTER, TABLE)
    lines = [*lines_of(found)]
    assert lines == [
        "backbone  10.0 MiB in 4 bits (nf4), 6.0 MiB in 16: embeddings 5.0 MiB, router 1.0 MiB",
        "adapted   1 of 1 linears, 0 of 1 parameters of experts",
        "data      1,024 samples, 78 % of their 1,000 tokens have a loss; "
        "of 1,027 records 3 (0.3 %) have none, 5 (0.5 %) have all",
        "kernels   attention sdpa",
    ]
    assert rows_of("\n".join(lines))[1] == ("adapted", "1 of 1 linears, 0 of 1 parameters of experts")


def test_a_backbone_in_16_bits_needs_no_reason() -> None:
    found = taken(linear(bits=16, packing=""), TABLE, bits=16)
    assert next(lines_of(found)) == "backbone  7.0 MiB in 16 bits: embeddings 5.0 MiB"


def test_shards_add_up_and_what_is_whole_on_every_rank_counts_once() -> None:
    parts = [Part((linear(own_bytes=size, whole_bytes=10),)) for size in (300, 299)]
    (found,) = merged(parts)
    assert (found.own_bytes, found.whole_bytes) == (599, 10)


def test_stages_add_up() -> None:
    parts = [Part((linear(f"model.layers.{layer}.mlp.up_proj"),)) for layer in (0, 1)]
    found = take_inventory(parts, bits=4, targets=("up_proj",), data=DATA, kernels=())
    assert (found.adapted.linears, found.adapted.of_linears, found.held[0].bytes) == (2, 2, 4 * MIB)


def test_an_adapter_that_one_rank_lacks_is_missing() -> None:
    parts = [Part((linear(is_adapted=yes),)) for yes in (True, False)]
    with pytest.raises(ModelError, match=f"1 of the 1 linears and experts that lora.targets names .*: {PROJ}"):
        take_inventory(parts, bits=4, targets=("q_proj",), data=DATA, kernels=())


def test_experts_left_in_16_bits_are_refused_with_their_bytes() -> None:
    """As the stock stack leaves them."""
    with pytest.raises(ModelError) as caught:
        taken(linear(), experts(bits=16, packing="", reason=UNPACKED))
    assert caught.value.message == (
        "8.0 MiB of the linears and experts of the decoder layers, 80.0% of their bytes, would stay in 16 bits where 4 "
        f"were asked for: {EXPERTS}"
    )
    assert caught.value.try_ == "--bits 16"


@pytest.mark.parametrize(("size", "refused"), [(100, False), (102, True)])
def test_a_hundredth_of_the_bytes_may_stay(size: int, refused: bool) -> None:
    modules = (linear(whole_bytes=9_900), linear("model.layers.0.x", packing="", reason=UNPACKED, whole_bytes=size))
    if refused:
        with pytest.raises(ModelError, match="would stay in 16 bits"):
            taken(*modules)
    else:
        assert taken(*modules).unpacked == ("model.layers.0.x",)


def test_what_the_checkpoint_stores_in_16_bits_and_routers_are_listed_and_not_counted() -> None:
    found = taken(experts(packing="mxfp4"), linear(bits=16, packing="", reason=STORED, whole_bytes=900 * MIB), ROUTER)
    assert found.unpacked_share == 0
    assert next(lines_of(found)) == (
        "backbone  8.0 MiB in 4 bits (mxfp4), 901 MiB in 16: stored so in the checkpoint 900 MiB, router 1.0 MiB"
    )


@pytest.mark.parametrize(
    ("modules", "targets", "words"),
    [
        ((linear(), linear("model.layers.1.self_attn.q_proj", is_adapted=False)), ("q_proj",),
         "1 of the 2 linears and experts that lora.targets names have no adapter: model.layers.1.self_attn.q_proj"),
        ((linear(), linear("visual.q_proj", is_targeted=False)), ("q_proj",),
         "1 module that lora.targets does not name is adapted: visual.q_proj"),
        ((linear(),), ("q_proj", "qproj"), "the target 'qproj' matches no module of the model"),
        ((linear(),), ("all-linear", "experts"), "the target 'experts' matches no module of the model"),
        ((linear(), experts(is_targeted=True, is_adapted=True)), ("all-linear", "experts.down_proj"),
         "the target 'experts.down_proj' matches no module of the model"),
    ],
)  # fmt: skip
def test_what_is_not_adapted_as_asked_is_refused(modules: Any, targets: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        taken(*modules, targets=targets)
    assert caught.value.message == words


def test_experts_are_adapted_by_their_own_targets() -> None:
    adapted = experts(is_targeted=True, is_adapted=True)
    assert taken(linear(), adapted, targets=("all-linear", "experts.gate_up_proj")).adapted.experts == 1
    assert taken(adapted, targets=("experts",)).adapted.of_experts == 1


def test_modules_that_the_plan_counts_must_be_there() -> None:
    with pytest.raises(
        ModelError, match=r"1 module that the plan counts is not in the model: model\.layers\.1\.mlp\.up"
    ):
        take_inventory(
            [Part((linear(),), ("model.layers.1.mlp.up",))], bits=4, targets=("q_proj",), data=DATA, kernels=()
        )


def test_data_without_a_learned_token_are_refused() -> None:
    nothing = Learned(samples=9, tokens=1000, learned_tokens=0, records=9, none=0)
    with pytest.raises(DataError, match="none of the 1,000 tokens of 9 samples has a loss"):
        taken(linear(), data=nothing)
