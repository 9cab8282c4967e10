"""Does a plan fit, use what is there, and say what would fit where it does not?"""

import re
from typing import Any

import msgspec
import pytest

from qdist.core.errors import PlanError, QdistError, SpecError
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Cluster, Gpu, Machine, hypothetical, joined
from qdist.core.planning.memory import Share, TrainingShape, budget, sizes
from qdist.core.planning.network import ASSUMED
from qdist.core.planning.plan import DataFacts, Plan, Start, digest
from qdist.core.planning.planner import USABLE_SHARE
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES, graph_bytes
from qdist.core.spec.sections import Train
from qdist.core.text import GIB, format_bytes
from tests.plans import CPU, gpus, machine, planned

DATA = DataFacts(path="cache", samples=110, train_samples=100, held_out_samples=10, tokens=9000, longest=120)
ONE_CARD_OF_80 = gpus(1, 80)
BIG = ("llama-65b", 1)
SHORT = {"seq_len": 64, "global_batch": 8}

TABLE: list[tuple[str, int, float, dict[str, Any], tuple[int, int, bool, int, str]]] = [
    # model, GPUs, GiB of each, settings -> micro_batch, accumulation, checkpointing, ZeRO stage, engine
    ("llama-7b", 1, 80, {}, (16, 1, False, 0, "torch")),
    ("llama-7b", 1, 24, {}, (4, 4, False, 0, "torch")),
    ("llama-7b", 1, 12, {}, (2, 8, False, 0, "torch")),
    ("llama-7b", 1, 8, {}, (4, 4, True, 0, "torch")),
    ("llama-7b", 4, 24, {}, (4, 1, False, 0, "torch")),
    ("llama-7b", 1, 24, {"train.checkpointing": False}, (4, 4, False, 0, "torch")),
    ("llama-7b", 2, 24, {"train.checkpointing": True}, (8, 1, True, 0, "torch")),
    ("llama-7b", 2, 24, {"micro_batch": 2}, (2, 4, False, 0, "torch")),
    ("llama-7b", 4, 24, {"gpus": 1}, (4, 4, False, 0, "torch")),
    ("llama3-8b", 1, 80, {"seq_len": 4096}, (1, 16, False, 0, "torch")),
    ("llama3.1-8b", 1, 80, {"seq_len": 16_384, "train.checkpointing": True}, (1, 16, True, 0, "torch")),
    ("llama-7b", 1, 80, {"global_batch": 128}, (16, 8, False, 0, "torch")),
    ("llama-7b", 1, 80, {"max_memory": "12GiB"}, (2, 8, False, 0, "torch")),
    ("llama-7b", 1, 80, {"bits": 16, "max_memory": "24GiB"}, (2, 8, False, 0, "torch")),
    ("llama-7b", 1, 80, {"zero.stage": 0}, (16, 1, False, 0, "torch")),
    ("llama-7b", 1, 80, {"zero.stage": 1}, (16, 1, False, 1, "deepspeed")),
    ("llama-7b", 1, 80, {"zero.offload": "cpu"}, (8, 2, False, 2, "deepspeed")),
    ("llama-7b", 2, 80, {"zero.stage": 0}, (8, 1, False, 0, "torch")),
    ("llama-65b", 1, 48, {}, (4, 4, True, 0, "torch")),
    ("llama-65b", 4, 48, {}, (4, 1, True, 2, "deepspeed")),
    ("llama-65b", 4, 48, {"zero.stage": 3}, (4, 1, True, 3, "deepspeed")),
    ("smollm2-135m", 0, 0, {}, (4, 4, False, 0, "torch")),
    ("smollm2-135m", 0, 0, {"gpus": 2, **SHORT}, (4, 1, False, 2, "deepspeed")),
    ("smollm2-135m", 0, 0, {"bits": 16, "train.checkpointing": True, **SHORT}, (8, 1, True, 0, "torch")),
]


@pytest.mark.parametrize(("model", "cards", "gib", "settings", "expected"), TABLE)
def test_a_machine_and_a_spec_decide_batches_memory_and_engine(
    model: str, cards: int, gib: float, settings: dict[str, Any], expected: tuple[int, int, bool, int, str]
) -> None:
    plan = planned(model, gpus(cards, gib) if cards else CPU, settings)
    found = (plan.micro_batch, plan.gradient_accumulation, plan.checkpointing, plan.zero_stage, plan.engine)
    assert found == expected


@pytest.mark.parametrize(("model", "cards", "gib", "settings", "_"), TABLE)
def test_every_plan_keeps_the_global_batch_and_its_place_in_memory(
    model: str, cards: int, gib: float, settings: dict[str, Any], _: object
) -> None:
    plan = planned(model, gpus(cards, gib) if cards else CPU, settings)
    assert plan.micro_batch * plan.gradient_accumulation * plan.world_size == plan.spec.batch
    assert [rank.rank for rank in plan.ranks] == list(range(plan.world_size))
    assert [rank.gpus for rank in plan.ranks] == [(rank,) if cards else () for rank in range(plan.world_size)]
    if cards:
        cap = 12 if settings.get("max_memory") == "12GiB" else 24 if "max_memory" in settings else gib
        assert all(rank.expected[0].required <= USABLE_SHARE * cap * GIB for rank in plan.ranks)


def test_the_adapter_state_is_divided_where_it_has_no_room_or_zero_is_asked_for() -> None:
    """Undivided it needs no exchange at the end of a step; on CPU ranks, which share their memory, it is divided."""
    roomy, tight = planned("llama-7b", gpus(2, 80)), planned("llama-65b", gpus(4, 24), {"global_batch": 64})
    assert (roomy.engine, roomy.zero_stage) == ("torch", 0)
    assert (tight.engine, tight.zero_stage) == ("deepspeed", 2)
    asked = planned("llama-7b", gpus(2, 80), {"zero.stage": 1})
    assert (asked.engine, asked.zero_stage) == ("deepspeed", 1)
    assert planned("smollm2-135m", CPU, {"gpus": 2}).zero_stage == 2


def test_a_cpu_plan_has_no_gpu_and_shares_the_cores() -> None:
    plan = planned("smollm2-135m", CPU, {"gpus": 4})
    assert (plan.device, plan.world_size, plan.threads_per_rank) == ("cpu", 4, 2)
    assert (plan.compute_dtype, plan.optimizer, plan.liger) == ("float32", "adamw", False)
    assert planned("smollm2-135m", CPU, {"gpus": 16}).threads_per_rank == 1


def test_a_gpu_plan_uses_what_gpus_have() -> None:
    plan = planned("llama-7b", gpus(2, 80))
    assert (plan.device, plan.world_size, plan.threads_per_rank) == ("cuda", 2, 8)
    assert (plan.compute_dtype, plan.optimizer, plan.liger) == ("bfloat16", "adamw", True)
    assert not planned("llama-7b", gpus(2, 80), has_liger=False).liger
    assert planned("llama-7b", gpus(2, 80), {"dtype": "float16", "optim.name": "adamw"}).compute_dtype == "float16"


def test_cards_without_bfloat16_compute_in_float16() -> None:
    t4 = hypothetical(1, 16 * GIB, name="Tesla T4")
    assert planned("llama-7b", t4).compute_dtype == "float16"
    assert planned("llama-7b", t4, {"dtype": "bfloat16"}).compute_dtype == "bfloat16"


def test_products_in_fp8_are_faster_and_unpack_a_byte_a_weight() -> None:
    plain, fp8 = (
        planned("llama-7b", gpus(1, 80), {"compute": compute, "micro_batch": 16}) for compute in (None, "fp8")
    )
    assert fp8.compute_dtype == "bfloat16"
    assert 1.3 < fp8.tokens_per_second / plain.tokens_per_second < 2
    assert fp8.ranks[0].expected[0].weights == plain.ranks[0].expected[0].weights
    largest, tokens, quantized = 4096 * 11008, 16 * 512, 11008
    saved = plain.ranks[0].expected[0].activations - fp8.ranks[0].expected[0].activations
    assert saved == largest - tokens * quantized


def test_the_smallest_card_decides() -> None:
    cards = [Gpu(index=i, name="", total_bytes=gib * GIB, free_bytes=gib * GIB) for i, gib in enumerate((80, 24))]
    uneven = Cluster(device="cuda", gpus=tuple(cards), cpu_count=8, memory_bytes=GIB, memory_free_bytes=GIB)
    assert planned("llama-13b", uneven).ranks == planned("llama-13b", gpus(2, 24)).ranks


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"steps": 7}, 7), ({"steps": None}, 7), ({"steps": None, "epochs": 3}, 19), ({"steps": None, "epochs": 0.1}, 1)],
)
def test_steps_are_given_or_follow_from_the_data(settings: dict[str, Any], steps: int) -> None:
    assert planned("llama-7b", ONE_CARD_OF_80, settings, data=DATA).steps == steps


def test_more_steps_than_can_be_counted_are_refused() -> None:
    with pytest.raises(SpecError, match=r"epochs=1e\+300 over 100 samples are more steps") as caught:
        planned("llama-7b", ONE_CARD_OF_80, {"steps": None, "epochs": 1e300}, data=DATA)
    assert caught.value.try_ == "--set epochs=auto"


def test_larger_gpus_are_suggested_to_whom_more_do_not_help() -> None:
    with pytest.raises(PlanError) as caught:
        planned("llama-7b", machine(2, 2), {"placement": "replicate"})
    assert caught.value.try_.startswith("GPUs of 8 GiB (")
    with pytest.raises(PlanError) as caught:
        planned("llama-7b", msgspec.structs.replace(CPU, memory_bytes=4 * GIB))
    assert caught.value.try_.startswith("GPUs of 8 GiB (")


@pytest.mark.parametrize(
    ("settings", "attempt"),
    [
        ({"lora.r": 100_000}, "--set lora.r=64"), ({"seq_len": 2048, "lora.r": 2000}, "--set lora.r=64"),
        ({"max_memory": "8GiB", "seq_len": 2048, "train.checkpointing": False, "optim.name": "adamw"},
         "--set train.checkpointing=true"),
    ],
)  # fmt: skip
def test_what_is_larger_than_usual_is_made_smaller_before_the_machine_is_larger(
    settings: dict[str, Any], attempt: str
) -> None:
    with pytest.raises(PlanError) as caught:
        planned("llama-7b", gpus(1, 24), settings)
    assert caught.value.try_.startswith(f"{attempt} (")
    planned("llama-7b", gpus(1, 24), settings | followed(attempt))


def test_sequences_are_no_longer_than_the_data() -> None:
    assert planned("llama-7b", ONE_CARD_OF_80, data=DATA).seq_len == 120
    assert planned("llama-7b", ONE_CARD_OF_80, {"seq_len": 100}, data=DATA).seq_len == 100


A100 = hypothetical(1, 80 * GIB, name="NVIDIA A100-SXM4-80GB")
REFUSALS: list[tuple[str, Cluster, dict[str, Any], type[QdistError], str, str]] = [
    ("smollm2-135m", CPU, {"optim.name": "paged-adamw"}, SpecError, "paged-adamw needs a GPU",
     "--set optim.name=adamw"),
    ("smollm2-135m", CPU, {"liger": True}, SpecError, "liger=true needs a GPU", "--set liger=false"),
    ("smollm2-135m", CPU, {"compute": "fp8"}, SpecError,
     "compute=fp8 needs matrix units for fp8, and this machine has no GPU", "--set compute=auto"),
    ("llama-7b", A100, {"compute": "fp8"}, SpecError,
     "compute=fp8 needs matrix units for fp8, which the NVIDIA A100-SXM4-80GB does not have", "--set compute=auto"),
    ("gpt-oss-20b", ONE_CARD_OF_80, {"compute": "fp8"}, SpecError,
     "those of .* are in 16 bits beside experts in MXFP4", "--set compute=auto"),
    ("smollm2-135m", CPU, {"max_memory": "1GiB"}, SpecError, "--max-memory caps GPUs, and this machine has none",
     "--max-memory auto"),
    ("llama-7b", gpus(2, 80), {"gpus": 4}, PlanError, "--gpus 4, but this machine has 2", "--gpus 2"),
    ("llama-7b", gpus(1, 24), {"max_memory": "48GiB"}, PlanError,
     r"--max-memory 48\.0 GiB, but the largest GPU has 24\.0 GiB", "--max-memory 24GiB"),
    ("llama-7b", gpus(2, 24), {"max_memory": "20GiB,1=48GiB"}, PlanError,
     r"--max-memory 1=48\.0 GiB, but GPU 1 has 24\.0 GiB", "--max-memory 24GiB"),
    ("llama-7b", gpus(2, 24), {"max_memory": "0=20GiB,2=16GiB"}, PlanError,
     "--max-memory caps GPU 2, and the last of 2 GPUs is GPU 1", "--max-memory 16GiB"),
    ("llama-7b", gpus(3, 80), {}, SpecError, "global_batch=16 cannot be spread over 3 ranks", "--set global_batch=18"),
    ("llama-7b", gpus(4, 80), {"micro_batch": 8}, SpecError,
     "4 ranks x micro_batch=8 does not divide global_batch=16", "--set micro_batch=4"),
    ("llama-7b", ONE_CARD_OF_80, {"steps": None}, SpecError, "synthetic data have no epochs", "--set steps=20"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "cluster", "settings", "kind", "message", "attempt"), REFUSALS)
def test_what_cannot_work_is_refused_and_the_way_out_works(
    model: str, cluster: Cluster, settings: dict[str, Any], kind: type[QdistError], message: str, attempt: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        planned(model, cluster, settings)
    assert caught.value.try_ == attempt
    planned(model, cluster, settings | followed(attempt))


@pytest.mark.parametrize("settings", [{}, {"zero.stage": 0}, {"placement": "shard"}, {"placement": "split"}])
def test_8_bit_moments_lie_whole_on_every_rank(settings: dict[str, Any]) -> None:
    plan = planned("llama-7b", gpus(2, 24), {"optim.name": "adamw-8bit", **settings})
    assert (plan.optimizer, plan.zero_stage, plan.engine) == ("adamw-8bit", 0, "torch")
    assert all(budget.pageable == 0 < budget.optimizer for rank in plan.ranks for budget in rank.expected)


NARROW = {"optim.reduce_dtype": "bfloat16"}


@pytest.mark.parametrize("settings", [{}, {"placement": "shard", "gpus_per_group": 2}, {"placement": "replicate"}])
def test_gradients_that_cross_in_16_bits_are_added_up_by_torch(settings: dict[str, Any]) -> None:
    plan = planned("llama-7b", gpus(4, 24), {**NARROW, **settings})
    assert (plan.zero_stage, plan.engine) == (0, "torch")


@pytest.mark.parametrize(
    ("count", "settings", "why"),
    [
        (1, {}, "one rank, or one group of stages, that has them all"),
        (2, {"placement": "split"}, "one rank, or one group of stages, that has them all"),
        (4, {"placement": "split", "gpus_per_group": 2}, "those of 2 groups of stages are DeepSpeed's"),
    ],
)
def test_gradients_in_16_bits_are_refused_where_torch_adds_none_up(count: int, settings: Any, why: str) -> None:
    with pytest.raises(SpecError, match=f"optim.reduce_dtype=bfloat16 is for gradients .* {why}") as caught:
        planned("llama-7b", gpus(count, 24), {**NARROW, **settings})
    assert caught.value.try_ == "--set optim.reduce_dtype=float32"
    planned("llama-7b", gpus(count, 24), {**NARROW, **settings, "optim.reduce_dtype": "float32"})


def test_a_run_that_is_left_with_one_of_its_nodes_goes_on_with_gradients_in_16_bits() -> None:
    left = joined([gpus(1, 24)], ["one"], [None], None)
    assert planned("llama-7b", left, NARROW).spec.optim.reduce_dtype == "bfloat16"


def test_liger_that_is_not_installed_is_refused() -> None:
    with pytest.raises(SpecError, match="liger-kernel is not installed") as caught:
        planned("llama-7b", ONE_CARD_OF_80, {"liger": True}, has_liger=False)
    assert caught.value.message.endswith(": pip install liger-kernel")
    assert caught.value.try_ == "--set liger=auto"


def followed(attempt: str) -> dict[str, Any]:
    """Settings from '--set micro_batch=1 --bits 4 (9.1 GiB)'; flags are settings of the same name."""
    words = attempt.partition(" (")[0].replace("--set ", "")
    flags = re.findall(r"--([\w-]+) (\S+)", words)
    pairs = re.findall(r"(?<!\S)([\w.]+)=(\S+)", words)
    return {name.replace("-", "_"): None if value == "auto" else value for name, value in [*flags, *pairs]}


TOO_BIG: list[tuple[str, int, int, dict[str, Any], str]] = [
    # model, GPUs, GiB of each, settings -> the nearest that fits
    ("llama-65b", 1, 40, {"bits": 16}, "--bits 4"),
    ("llama-65b", 1, 24, {"bits": 16, "micro_batch": 8}, "--bits 4"),
    ("llama-65b", 1, 80, {"bits": 8, "micro_batch": 8, "train.checkpointing": False}, "--set micro_batch=1"),
    ("llama-7b", 1, 8, {"seq_len": 2048, "train.checkpointing": False}, "--set train.checkpointing=true"),
    ("llama-7b", 1, 80, {"max_memory": "4GiB", "bits": 16, "micro_batch": 16}, "--set micro_batch=1"),
    ("llama-65b", 1, 8, {}, "--gpus 2"),
    ("llama-65b", 2, 4, {}, "--gpus 8"),
    ("llama-65b", 2, 2, {}, "GPUs of 8 GiB"),
    ("llama-65b", 4, 24, {"placement": "replicate"}, "--placement shard"),
    ("llama-65b", 2, 24, {"placement": "shard"}, "--placement split"),
    ("llama-65b", 4, 24, {"placement": "shard", "gpus_per_group": 2},
     "--gpus-per-group auto"),
    ("llama-65b", 4, 24, {"placement": "split", "gpus_per_group": 2}, "--gpus-per-group auto"),
    ("llama-65b", 4, 24, {"placement": "split", "gpus_per_group": 2, "zero.stage": 2},
     "--gpus-per-group auto --set zero.stage=auto"),
    ("llama-65b", 2, 24, {"zero.stage": 2}, "--set zero.stage=auto"),
    ("llama-65b", 2, 24, {"placement": "shard", "train.verify_steps": 5},
     "--placement split --set train.verify_steps=0"),
    ("llama-65b", 1, 80, {"split.schedule": "sequential", "split.offload_layers": 0, "max_memory": "24GiB"},
     "--set split.offload_layers=auto"),
    ("llama-65b", 1, 80, {"zero.offload": "cpu", "max_memory": "24GiB"}, "--max-memory 48GiB"),
    ("llama-65b", 1, 24, {"placement": "replicate"}, "--placement split"),
    ("llama-65b", 1, 8, {"placement": "replicate"}, "--gpus 2 --placement auto"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "cards", "gib", "settings", "attempt"), TOO_BIG)
def test_a_run_that_does_not_fit_says_by_how_much_and_what_would(
    model: str, cards: int, gib: int, settings: dict[str, Any], attempt: str
) -> None:
    with pytest.raises(PlanError, match=rf"{model} at .* bits needs .* more than 95 % of .* GiB") as caught:
        planned(model, gpus(cards, gib), settings)
    assert re.sub(r" \([\d.]+ GiB a GPU, .*\)$", "", caught.value.try_) == attempt
    changes = followed(attempt)
    larger = re.match(r"GPUs of (\d+) GiB", attempt)
    gib = int(larger[1]) if larger else gib
    plan = planned(model, gpus(max(cards, int(changes.get("gpus", 1))), gib), settings | changes)
    assert all(own.required <= USABLE_SHARE * gib * GIB for rank in plan.ranks for own in rank.expected)


def test_the_missing_bytes_are_what_is_needed_less_what_is_there() -> None:
    with pytest.raises(PlanError) as caught:
        planned("llama-7b", gpus(1, 4), {"placement": "replicate"})
    least_of_all = {"micro_batch": 1, "train.checkpointing": True, "optim.name": "paged-adamw"}
    (needed,) = planned("llama-7b", gpus(1, 80), least_of_all).ranks[0].expected
    load = planned("llama-7b", gpus(1, 80), {"micro_batch": 1}).load_peak_bytes
    least = max(needed.required, load)
    assert caught.value.message == (
        f"llama-7b at 4 bits needs {format_bytes(least)} on every GPU, "
        f"{format_bytes(least - int(USABLE_SHARE * 4 * GIB))} more than 95 % of 4.0 GiB"
    )


def test_a_note_says_what_is_recomputed_and_where_rates_come_from() -> None:
    assert planned("llama-65b", gpus(1, 48)).notes == (
        "activations of every layer do not fit and are recomputed in the backward pass",
        "no card was named: speed is predicted as of the RTX A6000",
    )
    assert (
        planned("llama-65b", gpus(4, 48), {"placement": "replicate"})
        .notes[0]
        .startswith("activations of 76 of 80 layers")
    )


def test_a_plan_survives_json_with_its_digest() -> None:
    plan = planned("llama3.1-8b", gpus(2, 80), {"zero.offload": "cpu", "lora.dropout": 0.1}, data=DATA)
    read = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert read == plan
    assert digest(read) == digest(plan) == digest(planned("llama3.1-8b", gpus(2, 80), {
        "zero.offload": "cpu", "lora.dropout": 0.1}, data=DATA))  # fmt: skip


@pytest.mark.parametrize(("model", "count", "gib", "settings"), [
    ("llama-7b", 1, 80, {}), ("llama-7b", 1, 24, {}), ("llama-7b", 1, 12, {}), ("llama-7b", 2, 24, {}),
    ("llama-65b", 4, 48, {"placement": "replicate"}), ("llama-65b", 4, 80, {"placement": "shard"}),
    ("llama-65b", 4, 24, {"placement": "split"}),
])  # fmt: skip
def test_moments_stay_on_gpus_that_have_room_for_everything(
    model: str, count: int, gib: int, settings: dict[str, Any]
) -> None:
    plan = planned(model, gpus(count, gib), settings)
    assert plan.optimizer == "adamw"
    for rank in plan.ranks:
        assert rank.expected[0].pageable == 0
        assert rank.expected[0].total == rank.expected[0].required <= USABLE_SHARE * gib * GIB


@pytest.mark.parametrize(("model", "count", "gib", "settings"), [
    ("llama-13b", 1, 12, {}), ("llama-65b", 1, 48, {}), ("llama-65b", 2, 24, {}),
    ("llama-65b", 1, 80, {"bits": 8}),
])  # fmt: skip
def test_moments_are_paged_where_not_even_full_recomputation_leaves_them_room(
    model: str, count: int, gib: int, settings: dict[str, Any]
) -> None:
    plan = planned(model, gpus(count, gib), settings)
    assert plan.optimizer == "paged-adamw"
    assert plan.checkpointed_layers == plan.facts.layer_count
    owns = [own for rank in plan.ranks for own in rank.expected]
    assert max(own.total for own in owns) > USABLE_SHARE * gib * GIB
    assert all(own.required <= USABLE_SHARE * gib * GIB and own.pageable > 0 for own in owns)


def test_an_optimizer_that_was_named_is_kept() -> None:
    paged, resident = (planned("llama-7b", ONE_CARD_OF_80, {"optim.name": name}) for name in ("paged-adamw", "adamw"))
    open_ = planned("llama-7b", ONE_CARD_OF_80)
    assert (paged.optimizer, resident.optimizer) == ("paged-adamw", "adamw")
    assert open_.ranks == resident.ranks
    (own,), (other,) = paged.ranks[0].expected, resident.ranks[0].expected
    assert own.total == other.total
    assert own.pageable == other.optimizer - own.optimizer > 0
    assert paged.tokens_per_second < resident.tokens_per_second
    small = planned("llama-7b", gpus(1, 8), {"optim.name": "adamw"})
    assert small.optimizer == "adamw"
    assert small.ranks[0].expected[0].total <= USABLE_SHARE * 8 * GIB


@pytest.mark.parametrize("gib", [10, 12, 16, 20, 24])
def test_layers_keep_what_they_compute_only_in_room_that_moments_leave(gib: int) -> None:
    """With one layer recomputed less, moments would have to leave the GPU."""
    settings = {"micro_batch": 8}
    plan = planned("llama-7b", gpus(1, gib), settings)
    assert plan.optimizer == "adamw"
    assert 0 < plan.checkpointed_layers < plan.facts.layer_count
    job = TrainingShape(
        bits=4, rank_r=64, targets=("all-linear",), seq_len=512, fused_loss=True, fused_layers=True, fused_lora=True,
    )  # fmt: skip
    share = Share(
        layers=(32,), checkpointed=plan.checkpointed_layers, micro_batch=8, gradient_accumulation=2,
        persistent_gradients=True, context_bytes=CUDA_CONTEXT_BYTES + graph_bytes(32),
    )  # fmt: skip
    assert budget(sizes(plan.facts, job), share) == plan.ranks[0].expected[0]
    more = msgspec.structs.replace(share, checkpointed=plan.checkpointed_layers - 1)
    assert budget(sizes(plan.facts, job), more).total > USABLE_SHARE * gib * GIB


def test_the_digest_changes_with_every_field() -> None:
    plan = planned("llama-7b", gpus(2, 80), data=DATA)
    other: dict[str, Any] = {
        "spec": msgspec.structs.replace(plan.spec, train=Train(keep=3)), "data": None, "device": "cpu",
        "source": msgspec.structs.replace(plan.source, config=plan.source.config | {"rope_theta": 1.0}),
        "facts": msgspec.structs.replace(plan.facts, vocab=7), "compute_dtype": "float16", "optimizer": "paged-adamw",
        "engine": "deepspeed", "placement": "split", "schedule": "1f1b",
        "layer_map": (0, 1), "offloaded_layers": (1,), "alternatives": (), "correction": Correction(speed=0.5),
        "liger": not plan.liger, "recurrence": "fla", "start": Start(path="an adapter", digest="ab"),
        "ranks": plan.ranks[:1], "notes": ("a note",), "fill": None,
        "nodes": (Machine(name="a", gpus=2),), "network": ASSUMED,
    }  # fmt: skip
    fields = [field.name for field in msgspec.structs.fields(Plan)]
    other |= {name: getattr(plan, name) + 1 for name in fields if name not in other}
    digests = {digest(msgspec.structs.replace(plan, **{name: other[name]})) for name in fields}
    assert len(digests | {digest(plan)}) == len(fields) + 1


def test_a_run_that_ends_before_its_rate_has_risen_is_told() -> None:
    warm = {"steps": 3, "optim.schedule": "linear", "optim.warmup_steps": 100}
    assert "optim.warmup_steps=100 of 3 steps: the rate ends at 6.0e-06 of 2.0e-04" in (
        planned("llama-7b", ONE_CARD_OF_80, warm, data=DATA).notes
    )
    assert not [
        note for note in planned("llama-7b", ONE_CARD_OF_80, {**warm, "steps": 100}, data=DATA).notes if "warm" in note
    ]
