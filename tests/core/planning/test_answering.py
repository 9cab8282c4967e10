"""Does a plan for inference count what a model that answers holds, and does its speed follow what its kernels take?"""

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from qdist.core.errors import QdistError, SpecError
from qdist.core.machine.cards import CARDS
from qdist.core.machine.cluster import Cluster, Rates, hypothetical
from qdist.core.model.aliases import config_of
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.model.shapes import Experts
from qdist.core.planning.answering import (
    AnsweringPlan,
    Questions,
    answering_footprint,
    answers_in_words,
    cards_for,
    memory_of_answers,
    plan_answers,
)
from qdist.core.planning.candidates import USABLE_SHARE
from qdist.core.planning.decoding import few_tokens, prompt_seconds, step_seconds, why_launched, why_one_by_one
from qdist.core.planning.expert_products import visited_experts
from qdist.core.planning.memory import Sizes, TrainingShape, sizes
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.spec.suggest import TooBigError
from qdist.core.text import GIB
from tests.core.planning.test_memory import facts_of
from tests.plans import CPU

H200 = Rates(matmul_flops_s=673e12, memory_bytes_s=4177e9, link_bytes_s=255e9, host_bytes_s=54e9, source="measured")
GPTQ = Gptq(shape=Shape(4, 128))


def parts_of(model: str, **changes: Any) -> Sizes:
    """Parts of a model with an adapter of r=64 on all linears."""
    usual: dict[str, Any] = {
        "bits": 4, "rank_r": 64, "targets": ("all-linear",), "seq_len": 1, "fused_layers": True, "fused_lora": True,
        "shared_reads": True,
    }  # fmt: skip
    return sizes(facts_of(model), TrainingShape(**usual | changes))


def answers(
    model: str = "llama-7b",
    *,
    batch: int = 1,
    context: int = 1024,
    adapters: int = 1,
    gpus: int = 1,
    card: str = "H200",
    cluster: Cluster | None = None,
    **settings: Any,
) -> AnsweringPlan:
    gib = next(own.gib for own in CARDS if own.title == card)
    return plan_answers(
        resolve(nest({"model": model, "steps": 1, **settings})), facts_of(model),
        cluster or hypothetical(gpus, gib * GIB, name=card), Questions(batch, context, adapters),
        config=config_of(model), has_liger=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "token_bytes"),
    [
        ("llama-7b", 32 * 2 * 32 * 128 * 2),
        ("qwen3-8b", 36 * 2 * 8 * 128 * 2),
        ("gemma3-12b", 48 * 2 * 8 * 256 * 2),  # layers with a window have rows as long as the others
        ("qwen3.5-9b", 8 * 2 * 4 * 256 * 2),  # of 32 layers every fourth has attention
    ],
)
def test_the_cache_has_keys_and_values_of_every_position_of_every_row(model: str, token_bytes: int) -> None:
    memory = memory_of_answers(parts_of(model), Questions(8, 1000), device="cuda")
    assert memory.cache == 8 * 1000 * token_bytes


@pytest.mark.parametrize("questions", [Questions(1, 16), Questions(1, 512), Questions(32, 2048), Questions(4, 8192, 3)])
@pytest.mark.parametrize("model", ["llama-7b", "qwen3-8b", "qwen3-30b-a3b", "smollm2-135m"])
def test_what_is_told_adds_up_to_what_is_placed(model: str, questions: Questions) -> None:
    parts = parts_of(model, rank_r=64 * questions.adapters)
    footprint = answering_footprint(parts, questions)
    told = memory_of_answers(parts, questions, device="cuda")
    assert told.total == footprint.model + footprint.everywhere


@pytest.mark.parametrize(
    ("context", "adapters", "in_float32"), [(1024, 1, False), (1024, 4, True), (1024, 0, False), (16, 1, True)]
)
def test_adapters_are_in_16_bits_unless_they_take_more_while_they_are_loaded(
    context: int, adapters: int, in_float32: bool
) -> None:
    memory = answers(context=context, adapters=adapters).memory
    parameters = adapters * 159_907_840
    assert memory.adapters == (4 * parameters - memory.cache if in_float32 else 2 * parameters)


def test_a_pooled_adapter_answers_as_wide_as_its_inputs() -> None:
    plain = memory_of_answers(parts_of("llama-7b", gptq=GPTQ), Questions(8, 512), device="cuda")
    adapter = msgspec.structs.replace(parts_of("llama-7b").job.adapter, pool=32)
    pooled = memory_of_answers(parts_of("llama-7b", gptq=GPTQ, adapter=adapter), Questions(8, 512), device="cuda")
    assert pooled == plain


@pytest.mark.parametrize(
    ("tokens", "gptq", "measured_ms"),
    [
        (1, False, 3.321), (1, True, 3.136), (2, False, 4.639), (8, False, 4.718), (16, True, 4.764),
        (32, False, 5.502), (32, True, 5.559), (64, False, 6.871), (64, True, 7.692),
    ],
)  # fmt: skip
def test_linears_of_a_7b_take_what_was_measured(tokens: int, gptq: bool, measured_ms: float) -> None:
    """32 layers by bench/decode_kernels.py on an H200, with r=64; here a step with an empty cache, less the rest."""
    rows = {}
    for rank, targets in ((64, ("all-linear",)), (0, ())):
        parts = parts_of("llama-7b", rank_r=rank, targets=targets, gptq=GPTQ if gptq else None)
        rows[rank] = step_seconds(parts, H200, tokens, filled=0, captured=True)
        few = few_tokens(parts.job, tokens)
        assert few is not None
    packed = sum(own.packed for own in parts.layers) * 32 / (few.share * H200.memory_bytes_s)
    linears = rows[64] - rows[0] + packed + 4 * 32 * few.start_s
    assert linears == pytest.approx(measured_ms / 1e3, rel=0.06)


@pytest.mark.parametrize(
    ("rows", "filled", "captured", "measured_ms"),
    [(1, 192, True, 3.91), (8, 84, True, 5.66), (32, 84, True, 6.78), (1, 192, False, 58.8)],
)
def test_steps_of_a_7b_take_what_was_measured(rows: int, filled: int, captured: bool, measured_ms: float) -> None:
    """NF4 with r=64 by bench/decode.py on an H200, 2026-11-30: 64 tokens in, 256 out at one row, 40 at several."""
    predicted = step_seconds(parts_of("llama-7b"), H200, rows, filled=filled, captured=captured)
    assert predicted == pytest.approx(measured_ms / 1e3, rel=0.05)


def test_the_first_token_of_a_long_prompt_comes_about_when_it_did() -> None:
    """2,048 tokens through the same model: 86 ms."""
    assert prompt_seconds(parts_of("llama-7b"), H200, 2048) == pytest.approx(0.086, rel=0.15)


@pytest.mark.parametrize("model", ["llama-7b", "qwen3-8b", "llama-65b", "qwen3-30b-a3b"])
def test_a_step_takes_longer_with_more_rows_and_fuller_caches_and_gives_more_tokens(model: str) -> None:
    parts = parts_of(model)
    steps = [step_seconds(parts, H200, rows, filled=512, captured=True) for rows in (1, 8, 32, 64)]
    assert steps == sorted(steps)
    speeds = [rows / step for rows, step in zip((1, 8, 32, 64), steps, strict=True)]
    assert speeds == sorted(speeds)
    assert step_seconds(parts, H200, 32, filled=4096, captured=True) > steps[2]
    assert step_seconds(parts, H200, 1, filled=512, captured=False) > steps[0]
    assert prompt_seconds(parts, H200, 32_000) > prompt_seconds(parts, H200, 2000)


def test_no_token_is_faster_than_the_bytes_that_it_reads() -> None:
    plan = answers(card="H200")
    assert 100 < plan.tokens_per_second_alone < 4.8e12 / plan.memory.weights
    assert plan.filled == 512


@pytest.mark.parametrize(
    ("count", "active", "tokens", "visited"),
    [(128, 8, 1, 8), (128, 8, 2, 15.5), (128, 8, 4096, 128), (4, 4, 1, 4), (32, 4, 3, 32 * (1 - 0.875**3))],
)
def test_tokens_visit_as_many_different_experts_as_is_to_be_expected(
    count: int, active: int, tokens: int, visited: float
) -> None:
    experts = Experts(path="mlp.experts", count=count, active=active, matrices=())
    assert visited_experts(experts, tokens) == pytest.approx(visited)


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("llama-7b", {}, ""),
        ("qwen3-30b-a3b", {}, ""),
        ("gpt-oss-20b", {"bits": 16, "mxfp4": True}, ""),
        ("qwen3-30b-a3b", {"grouped": False}, "experts are taken in turn, as the router has it"),
        ("llama-7b", {"bits": 8}, "products in int8 wait for the GPU to report outliers"),
        ("llama-7b", {"bits": 8, "gptq": GPTQ}, ""),
        ("qwen3.5-9b", {}, "it has layers that keep something else than keys and values"),
        ("bloom-7b1", {}, "its attention adds a bias to scores"),
    ],
)
def test_what_cannot_be_captured_says_why(model: str, changes: dict[str, Any], reason: str) -> None:
    parts = parts_of(model, **changes)
    assert why_launched(parts.facts, parts.job) == reason


@pytest.mark.parametrize(
    ("changes", "tokens", "most"),
    [
        ({}, 1, 1), ({}, 2, 16), ({}, 17, 32), ({}, 64, 64), ({}, 65, None), ({"bits": 16}, 1, None),
        ({"compute_bytes": 4}, 1, None), ({"gptq": GPTQ}, 8, 16), ({"gptq": Gptq(shape=Shape(3, 128))}, 1, None),
        ({"gptq": Gptq(shape=Shape(4, 128), desc_act=True)}, 1, None),
    ],
)  # fmt: skip
def test_few_tokens_are_multiplied_with_packed_weights_where_a_kernel_does(
    changes: dict[str, Any], tokens: int, most: int | None
) -> None:
    found = few_tokens(parts_of("llama-7b", **changes).job, tokens)
    assert (found and found.tokens) == most


def test_answers_that_have_passes_of_their_own_are_no_faster_together() -> None:
    plan = answers("qwen3.5-9b", batch=16)
    assert why_one_by_one(plan.facts)
    assert plan.tokens_per_second == pytest.approx(plan.tokens_per_second_alone)
    assert plan.notes[-1].startswith("each answer has a pass of its own for every token: ")


def test_several_small_gpus_hold_one_model_and_a_single_one_fetches_layers() -> None:
    whole, spread = answers("llama-65b"), answers("llama-65b", gpus=2, card="RTX 4090", batch=1)
    alone = answers("llama-65b", card="RTX 4090")
    assert (len(whole.residence.gpus), len(spread.residence.gpus), len(alone.residence.gpus)) == (1, 2, 1)
    assert alone.residence.offloaded
    assert not spread.residence.offloaded
    assert alone.tokens_per_second_alone < spread.tokens_per_second_alone < whole.tokens_per_second_alone
    assert alone.notes[-1] == "offloaded layers are copied to the GPU for every token"
    assert spread.notes[-1] == "2 GPUs hold one model: one of them works at a time, launched kernel by kernel"
    assert answers_in_words(spread).endswith(", layers 0-39 on GPU 0, 40-79 on GPU 1")


def test_gpus_that_hold_a_copy_each_are_counted() -> None:
    assert answers(gpus=4).notes[-1] == "speeds are of one GPU; qdist generate deals prompts to 4"
    assert not any("qdist generate" in note for note in answers(gpus=1).notes)


def test_int8_is_launched_kernel_by_kernel() -> None:
    plan = answers(bits=8)
    assert plan.notes[-1] == "steps are launched kernel by kernel: products in int8 wait for the GPU to report outliers"


def test_a_cpu_keeps_weights_unpacked_if_it_has_the_memory() -> None:
    roomy, tight = answers(cluster=CPU), answers(cluster=msgspec.structs.replace(CPU, memory_bytes=16 * GIB))
    assert roomy.memory.weights == pytest.approx(4 * 6.74e9, rel=0.01)
    assert tight.memory.weights < 5 * GIB
    for plan in (roomy, tight):
        assert (plan.tokens_per_second, plan.prompt_s, plan.cards) == (0, 0, ())
        assert plan.residence.gpus == ()
        assert plan.notes[-1] == "speed is not predicted on a CPU"


def test_cards_that_would_do_hold_all_of_it_and_the_smallest_comes_first() -> None:
    found = answers("llama-65b", batch=4).cards
    need = answers("llama-65b", batch=4).memory.total
    assert {card.title for card in found} == {card.title for card in CARDS if need <= USABLE_SHARE * card.gib * GIB}
    assert [card.gib for card in found] == sorted(card.gib for card in found)
    for one, other in pairwise(found):
        assert one.gib < other.gib or one.tokens_per_second >= other.tokens_per_second > 0
    assert cards_for(parts_of("llama-65b"), Questions(512, 2048)) == ()


@pytest.mark.parametrize(
    ("asked", "message", "way"),
    [
        ({"batch": 0}, "--batch 0 is not between 1 and 4,096", {"batch": 1}),
        ({"batch": 5000}, "--batch 5,000 is not between 1 and 4,096", {"batch": 4096}),
        ({"context": 4096}, "--context 4,096 is not between 2 and 2,048, the positions of llama-7b", {"context": 2048}),
        ({"context": 1}, "--context 1 is not between 2 and 2,048, the positions of llama-7b", {"context": 2}),
        ({"adapters": -1}, "--adapters -1 is not between 0 and 1,024", {"adapters": 0}),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_nearest(asked: dict[str, Any], message: str, way: object) -> None:
    with pytest.raises(SpecError) as refused:
        answers(**asked)
    assert (refused.value.message, refused.value.ways) == (message, (way,))


@pytest.mark.parametrize(
    ("asked", "message", "first"),
    [
        (
            {"batch": 128, "context": 2048, "card": "RTX 4090"},
            r"answering takes .* GiB, .* GiB more than may be filled: even with all 32 layers in host memory",
            {"context": 1024},
        ),
        ({"cluster": msgspec.structs.replace(CPU, memory_bytes=8 * GIB), "bits": 16},
         r"answering takes .* GiB of host memory, .* GiB more than the 7\.6 GiB", {"context": 512}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_missing_bytes(
    asked: dict[str, Any], message: str, first: object
) -> None:
    with pytest.raises(TooBigError, match=message) as refused:
        answers(**asked)
    assert refused.value.ways[0] == first
    assert any("gpu_memory" in way for way in refused.value.ways)
    fits = [way for way in refused.value.ways if _fits(asked | dict(way))]
    assert fits


def _fits(asked: dict[str, Any]) -> bool:
    asked.pop("gpu_memory", None)
    try:
        answers(**asked)
    except QdistError:
        return False
    return True
