"""Is every plan of a grid of models, machines and placements one that can run?"""

import time
from typing import Any

import msgspec
import pytest

from qdist.core.errors import PlanError, QdistError, SpecError
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Cluster, Gpu, Rates, hypothetical
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.candidates import USABLE_SHARE, Candidate
from qdist.core.planning.fill import MicroBatch
from qdist.core.planning.memory import MemoryBudget, resident
from qdist.core.planning.placements.registry import layouts
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.planning.process_memory import graph_bytes
from qdist.core.planning.ranking import choose
from qdist.core.spec.run_spec import memory_cap_of, nest, resolve
from qdist.core.text import GIB
from tests.plans import CPU, gpus, machine, planned

FAST = Rates(matmul_flops_s=790e12, memory_bytes_s=4.3e12, link_bytes_s=350e9, host_bytes_s=50e9, source="measured")
SHARD, SPLIT = {"placement": "shard"}, {"placement": "split"}
TWO = {"gpus_per_group": 2}
MODELS = ["llama-7b", "llama-65b", "llama3-8b", "bloom-7b1", "opt-6.7b", "pythia-6.9b", "qwen3-4b", "glm-4-9b"]


def check(plan: Plan, cluster: Cluster) -> None:
    """What must hold of any plan."""
    assert plan.micro_batch * plan.gradient_accumulation * plan.data_parallel == plan.spec.batch
    assert [rank.rank for rank in plan.ranks] == list(range(plan.world_size))
    size = plan.gpus_per_group
    if plan.schedule == "sequential":
        assert (plan.world_size, plan.groups, plan.engine) == (1, 1, "torch")
    else:
        assert plan.world_size == plan.groups * size
        assert [(rank.group, rank.position) for rank in plan.ranks] == [divmod(i, size) for i in range(plan.world_size)]
    if plan.schedule == "1f1b":
        assert plan.gradient_accumulation >= size
        assert plan.zero_stage <= 2
        assert set(plan.layer_map) == set(range(size))
        assert plan.checkpointed_layers in (0, plan.facts.layer_count)
    assert len(plan.layer_map) == (plan.facts.layer_count if plan.placement == "split" else 0)
    assert list(plan.layer_map) == sorted(plan.layer_map)
    assert 0 <= plan.checkpointed_layers <= plan.facts.layer_count
    used = [gpu for rank in plan.ranks for gpu in rank.gpus]
    assert used == (list(range(plan.groups * size)) if cluster.gpus else [])
    for rank in plan.ranks:
        assert len(rank.expected) == max(1, len(rank.gpus))
        for gpu, own in zip(rank.gpus, rank.expected, strict=False):
            total = cluster.gpus[gpu].total_bytes
            assert own.required <= USABLE_SHARE * min(total, memory_cap_of(plan.spec, gpu) or total)
            assert all(part >= 0 for part in msgspec.structs.astuple(own))
    assert (plan.tokens_per_second > 0) == bool(cluster.gpus)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


@pytest.mark.parametrize(
    "settings", [{}, SHARD, SHARD | TWO, SPLIT, SPLIT | TWO, SPLIT | {"split.schedule": "sequential"}]
)
@pytest.mark.parametrize(("count", "gib"), [(2, 24), (4, 24), (4, 80), (8, 16)])
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_that_is_made_can_run(model: str, count: int, gib: int, settings: dict[str, Any]) -> None:
    cluster = gpus(count, gib)
    refused: PlanError | None = None
    try:
        plan = planned(model, cluster, settings | {"global_batch": 32})
    except PlanError as error:
        refused = error
    if refused:
        assert "iB more than 95 % of " in refused.message
        assert refused.try_
        return
    check(plan, cluster)
    assert plan.placement == settings.get("placement", plan.placement)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("settings", [SHARD, SHARD | TWO | {"gpus": 4}, SPLIT, SPLIT | TWO | {"gpus": 4}])
def test_cpu_ranks_can_shard_and_split(settings: dict[str, Any], bits: int) -> None:
    plan = planned("smollm2-135m", CPU, {"gpus": 2, "bits": bits} | settings)
    check(plan, CPU)
    assert plan.placement == settings["placement"]


UNEVEN: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    # GiB of each card, settings -> layers on each position
    ((24, 48), SPLIT, (37, 43)),
    ((48, 24), SPLIT | {"split.schedule": "sequential"}, (54, 26)),
    ((16, 24, 40), SPLIT | {"global_batch": 24}, (22, 29, 29)),
    ((24, 48, 24, 48), SPLIT | TWO | {"train.checkpointing": True}, (38, 42)),
]


@pytest.mark.parametrize(("gibs", "settings", "counts"), UNEVEN)
def test_uneven_cards_hold_what_they_have_room_for(
    gibs: tuple[int, ...], settings: dict[str, Any], counts: tuple[int, ...]
) -> None:
    cluster = machine(*gibs)
    plan = planned("llama-65b", cluster, settings)
    check(plan, cluster)
    assert tuple(plan.layer_map.count(position) for position in range(plan.gpus_per_group)) == counts


def test_all_cards_are_capped() -> None:
    cluster = machine(48, 80)
    plan = planned("llama-65b", cluster, {"max_memory": "64GiB"})
    check(plan, cluster)
    with pytest.raises(PlanError, match=r"the largest GPU has 80\.0 GiB"):
        planned("llama-65b", cluster, {"max_memory": "96GiB"})


def test_each_card_can_have_a_cap_of_its_own() -> None:
    cluster = gpus(2, 48)
    sequential = SPLIT | {"split.schedule": "sequential"}
    wide, narrow = (planned("llama-65b", cluster, sequential | {"max_memory": cap}) for cap in ("1=20GiB", "0=20GiB"))
    for plan in (wide, narrow):
        check(plan, cluster)
    assert wide.layer_map.count(0) > wide.layer_map.count(1)
    assert narrow.layer_map.count(0) < narrow.layer_map.count(1)


BEST: list[tuple[str, int, int, dict[str, Any], tuple[str, str | None, int]]] = [
    # model, GPUs, GiB, settings -> placement, schedule, GPUs a group
    ("llama-7b", 1, 24, {}, ("replicate", None, 1)),
    ("llama-7b", 4, 80, {}, ("replicate", None, 1)),
    ("llama-65b", 1, 48, {}, ("replicate", None, 1)),
    ("llama-65b", 4, 24, {}, ("shard", None, 4)),
    ("llama-65b", 4, 24, {"placement": "split"}, ("split", "1f1b", 4)),
    ("llama-65b", 2, 24, {}, ("split", "1f1b", 2)),
    ("llama-65b", 1, 24, {}, ("split", "sequential", 1)),
    ("llama-65b", 4, 140, {"global_batch": 64}, ("replicate", None, 1)),
]


@pytest.mark.parametrize(("model", "count", "gib", "settings", "expected"), BEST)
def test_the_fastest_layout_that_fits_is_chosen_and_every_other_has_its_reason(
    model: str, count: int, gib: int, settings: dict[str, Any], expected: tuple[str, str | None, int]
) -> None:
    plan = planned(model, gpus(count, gib), settings)
    assert (plan.placement, plan.schedule, plan.gpus_per_group) == expected
    for other in plan.alternatives:
        assert other.reason
        assert (other.placement, other.schedule, other.gpus_per_group) != expected
        assert other.tokens_per_second <= plan.tokens_per_second / 0.98
        assert (other.tokens_per_second == 0) == (" more than 95 % of " in other.reason)
    ways = {(other.placement, other.schedule, other.gpus_per_group) for other in plan.alternatives}
    assert len(ways) == len(plan.alternatives)


def test_of_equals_the_simpler_wins() -> None:
    """7B with room to spare: sharding over NVLink costs next to nothing, and gains nothing."""
    plan = planned("llama-7b", gpus(4, 80), {"global_batch": 64})
    reasons = {(other.placement, other.gpus_per_group): other.reason for other in plan.alternatives}
    assert plan.placement == "replicate"
    assert reasons["shard", 4] == reasons["shard", 2] == "no faster, and less simple"


def test_slow_links_make_a_split_faster_than_shards() -> None:
    slow = msgspec.structs.replace(FAST, link_bytes_s=4e9)
    cluster = gpus(4, 24)
    plans = [
        planned("llama-65b", msgspec.structs.replace(cluster, rates=rates), {"global_batch": 64})
        for rates in (FAST, slow)
    ]
    assert [(plan.placement, plan.schedule) for plan in plans] == [("shard", None), ("split", "1f1b")]


def test_layers_go_to_host_memory_only_where_nothing_else_fits() -> None:
    plan = planned("llama-65b", gpus(1, 24))
    assert len(plan.offloaded_layers) == 61
    assert any("61 of 80 layers are offloaded to host memory, since nothing else fits" in note for note in plan.notes)
    assert planned("llama-65b", gpus(1, 24), {"split.offload_layers": 75}).offloaded_layers[0] == 0
    assert planned("llama-65b", gpus(2, 24), SPLIT | {"split.offload_layers": 4}).offloaded_layers == (10, 30, 50, 70)
    poor = msgspec.structs.replace(gpus(1, 24), memory_bytes=8 * GIB)
    with pytest.raises(
        PlanError, match=r"47 layers could be offloaded to host memory, but they are 18\.3 GiB and 95 % of"
    ):
        planned("llama-65b", poor)
    poor = msgspec.structs.replace(gpus(1, 48), memory_bytes=8 * GIB)
    with pytest.raises(PlanError, match=r"40 offloaded layers need 15\.\d GiB of host memory"):
        planned("llama-65b", poor, {"split.offload_layers": 40})


def test_more_layers_than_there_are_cannot_be_taken_off_the_gpu() -> None:
    with pytest.raises(SpecError, match="offload_layers=400, but llama-7b has 32 layers") as caught:
        planned("llama-7b", gpus(1, 24), {"split.offload_layers": 400})
    assert caught.value.try_ == "--set split.offload_layers=32"


@pytest.mark.parametrize(
    ("model", "name", "settings", "note"),
    [
        ("llama-7b", "NVIDIA H200", {"zero.stage": 3}, "zero.stage=3 gathers adapters that stay whole on every rank"),
        ("llama-7b", "Tesla T4", {"dtype": "bfloat16"}, "a Tesla T4 emulates bfloat16, which is slow: --set dtype=flo"),
        ("llama-65b", "RTX 4090", {"train.answers": 3}, "sequential: the stages of a 1f1b split cannot generate the"),
        ("llama-65b", "RTX 4090", {"new_tokens": ["a"]}, "sequential: the stages of a 1f1b split cannot train a new r"),
    ],
)
def test_what_costs_or_was_not_asked_for_is_noted(model: str, name: str, settings: dict[str, Any], note: str) -> None:
    cards = hypothetical(2, 24 * GIB, name=name)
    assert any(said.startswith(note) for said in planned(model, cards, settings).notes)
    assert not any(said.startswith(note) for said in planned(model, cards).notes)


def test_what_was_learnt_scales_speed_and_replaces_the_context() -> None:
    plain = planned("llama-7b", gpus(2, 80))
    learnt = Correction(speed=0.8, speeds=(("shard", 0.5),), context_bytes=3 * GIB, runs=3)
    corrected = planned("llama-7b", gpus(2, 80), correction=learnt)
    assert corrected.tokens_per_second == pytest.approx(0.8 * plain.tokens_per_second, rel=1e-3)
    assert corrected.graphs
    assert corrected.ranks[0].expected[0].context == 3 * GIB + graph_bytes(32)
    launched = planned("llama-7b", gpus(2, 80), {"graphs": False}, correction=learnt)
    assert launched.ranks[0].expected[0].context == 3 * GIB
    assert corrected.correction == learnt
    assert corrected.notes[-1] == "speed and context corrected by 3 earlier runs on this kind of card"
    by_name = {other.placement: other.tokens_per_second for other in corrected.alternatives}
    usual = {other.placement: other.tokens_per_second for other in plain.alternatives}
    assert by_name["shard"] == pytest.approx(0.5 * usual["shard"], rel=1e-2)


def test_a_resumed_run_keeps_its_micro_batch_where_it_can() -> None:
    usual = planned("llama-7b", gpus(2, 80), {"global_batch": 24}, usual=MicroBatch(3))
    assert (usual.micro_batch, usual.gradient_accumulation) == (3, 4)
    assert planned("llama-7b", gpus(2, 80), usual=MicroBatch(3)).micro_batch in (1, 2, 4, 8)


def test_rows_added_to_the_vocabulary_keep_the_tables_whole() -> None:
    whole = planned("llama3-8b", gpus(4, 24), SHARD, vocab_rows=128_300).ranks[0].expected[0].weights
    parts = planned("llama3-8b", gpus(4, 24), SHARD).ranks[0].expected[0].weights
    assert whole - parts == pytest.approx(0.75 * 2 * 2 * 128_256 * 4096, rel=1e-3)


def test_measured_rates_win_over_the_table_and_say_nothing() -> None:
    slow, fast = (
        planned("llama-7b", msgspec.structs.replace(gpus(1, 80), rates=rates))
        for rates in (msgspec.structs.replace(FAST, matmul_flops_s=1e14), FAST)
    )
    assert slow.tokens_per_second < fast.tokens_per_second
    assert not slow.notes
    odd = Gpu(index=0, name="Abacus 9", total_bytes=80 * GIB, free_bytes=80 * GIB)
    unknown = planned("llama-7b", msgspec.structs.replace(gpus(1, 80), gpus=(odd,)))
    assert unknown.notes == ("nothing is known of Abacus 9: speed is predicted as of the A100-SXM4-80GB",)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (SPLIT | {"micro_batch": 8}, SpecError, "4 stages need at least 4 micro-batches a step"),
        (SPLIT | {"micro_batch": 8, "split.schedule": "1f1b"}, SpecError, "global_batch=16 has 2 of 8 for each group"),
        (SPLIT | TWO | {"micro_batch": 8}, SpecError, "2 stages need at least 2 micro-batches a step"),
        (SPLIT | {"global_batch": 3}, SpecError, "global_batch=3 has 3 of 1 for each group"),
        (SPLIT | TWO | {"global_batch": 3}, SpecError, "cannot be spread over 2 groups"),
        (SHARD | {"global_batch": 6}, SpecError, "cannot be spread over 4 ranks"),
    ],
)
def test_batches_that_do_not_fit_the_grid_are_refused(
    settings: dict[str, Any], kind: type[QdistError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        planned("llama-7b", gpus(4, 80), settings)
    for attempt in caught.value.try_.split(", or "):
        key, value = attempt.removeprefix("--set ").split("=")
        check(planned("llama-7b", gpus(4, 80), settings | {key: value}), gpus(4, 80))


def test_the_global_batch_that_a_pipeline_needs_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        planned("llama-7b", gpus(4, 80), SPLIT | {"micro_batch": 8})
    assert caught.value.try_ == "--set micro_batch=4"
    with pytest.raises(SpecError) as caught:
        planned("llama-7b", gpus(4, 80), SPLIT | TWO | {"global_batch": 2, "micro_batch": 1})
    assert caught.value.try_ == "--set global_batch=4"


ANSWERS = {"train.answers": 3}
STAGES = SPLIT | {"split.schedule": "1f1b"}
CANNOT_ANSWER = "the stages of a 1f1b split cannot generate the answers of train.answers=3"
NEW_ROWS = (128_256, 128_257)
CANNOT_LEARN = "the stages of a 1f1b split cannot train 2 new rows of the vocabulary"


@pytest.mark.parametrize("settings", [STAGES, SPLIT | TWO])
def test_stages_that_are_asked_for_answers_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        planned("llama-7b", gpus(4, 80), settings | ANSWERS)
    assert caught.value.message == CANNOT_ANSWER
    assert caught.value.try_ == "--set train.answers=0 (and qdist generate RUN afterwards)"
    assert planned("llama-7b", gpus(4, 80), settings).schedule == "1f1b"


@pytest.mark.parametrize(
    ("settings", "attempt", "way"),
    [
        (STAGES, "--placement shard --set split.schedule=auto", SHARD),
        (SPLIT | TWO, "--placement shard", SHARD | TWO),
    ],
)
def test_stages_that_would_train_new_rows_are_refused(
    settings: dict[str, Any], attempt: str, way: dict[str, Any]
) -> None:
    with pytest.raises(SpecError) as caught:
        planned("llama3-8b", gpus(4, 24), settings, vocab_rows=128_258, new_token_ids=NEW_ROWS)
    assert (caught.value.message, caught.value.try_) == (CANNOT_LEARN, attempt)
    check(planned("llama3-8b", gpus(4, 24), way, vocab_rows=128_258, new_token_ids=NEW_ROWS), gpus(4, 24))


@pytest.mark.parametrize(
    ("settings", "rows", "reason"), [(ANSWERS, (), CANNOT_ANSWER), ({}, (32_000,), "cannot train a new row of the voc")]
)
@pytest.mark.parametrize("placement", [{}, SPLIT])
def test_where_stages_cannot_do_what_is_wanted_another_layout_is_chosen(
    settings: dict[str, Any], rows: tuple[int, ...], reason: str, placement: dict[str, Any]
) -> None:
    cluster = gpus(2, 24)
    assert planned("llama-65b", cluster, placement).schedule == "1f1b"
    plan = planned("llama-65b", cluster, placement | settings, new_token_ids=rows)
    check(plan, cluster)
    assert plan.schedule == "sequential"
    (stages,) = (other for other in plan.alternatives if other.schedule == "1f1b")
    assert reason in stages.reason
    assert stages.tokens_per_second > plan.tokens_per_second


def test_answers_cost_nothing_where_stages_would_have_lost_anyway() -> None:
    plain, asked = (planned("llama-7b", gpus(4, 80), settings) for settings in ({}, ANSWERS))
    assert (asked.placement, asked.tokens_per_second) == ("replicate", plain.tokens_per_second)
    reasons = {other.reason for other in asked.alternatives if other.schedule == "1f1b"}
    assert reasons == {CANNOT_ANSWER}


def test_of_equals_the_one_with_room_for_moments_wins() -> None:
    """A micro-batch that gains a hundredth is not worth moments that leave the GPU."""
    layout = layouts(resolve(), 1, device="cuda")[0]
    own = MemoryBudget(
        weights=4 * GIB, adapter=0, gradients=0, optimizer=0, activations=0, logits=0, gathers=0, context=0,
        pageable=GIB,
    )  # fmt: skip
    paged = Candidate(
        layout=layout, micro_batch=8, micro_batches=2, checkpointed=32, layer_map=(), offloaded=(), budgets=(own,),
        load_peaks=(0,), rooms=(int(4.5 * GIB),), seconds=1.0, paged=True,
    )  # fmt: skip
    roomy = paged._replace(budgets=(resident(own),), rooms=(5 * GIB,), micro_batch=4, seconds=1.01, paged=False)
    assert (paged.fits, paged.roomy, roomy.roomy) == (True, False, True)
    assert choose([paged, roomy]) is roomy
    assert choose([paged, roomy._replace(seconds=1.1)]) is paged


@pytest.mark.parametrize("cluster", [CPU, machine(24), machine(24, 48), machine(*[8] * 6)])
@pytest.mark.parametrize("placement", [{}, SPLIT, SHARD])
def test_models_of_one_layer_are_planned_or_refused(cluster: Cluster, placement: dict[str, Any]) -> None:
    spec = resolve(nest({"model": "m", "steps": 5, "global_batch": 12, **placement}))
    one_layered = from_config({**config_of("llama-7b"), "num_hidden_layers": 1}, name="m")
    source = Source(kind="dummy", path="", config={}, tokenizer="")
    refused: SpecError | None = None
    try:
        plan = make_plan(spec, source, one_layered, cluster, None)
    except SpecError as error:
        refused = error
    if refused:
        assert refused.try_
        return
    assert plan.schedule in (None, "sequential")
    assert all("at least as many layers" in own.reason for own in plan.alternatives if own.schedule == "1f1b")


def test_more_stages_than_layers_are_listed_with_the_reason() -> None:
    plan = planned("smollm2-135m", gpus(32, 24), {"global_batch": 64})
    (impossible,) = (other for other in plan.alternatives if not other.required_bytes)
    assert (impossible.schedule, impossible.gpus_per_group) == ("1f1b", 32)
    assert impossible.reason == "32 stages need at least as many layers, and smollm2-135m has 30 layers"
    assert any(other.schedule == "1f1b" and other.gpus_per_group == 16 for other in plan.alternatives)


def test_planning_65b_takes_a_fraction_of_a_second() -> None:
    began = time.process_time()
    planned("llama-65b", gpus(4, 24))
    assert time.process_time() - began < 0.3
