"""How long does a step take? Predictions against what was measured; add a row for each new measurement."""

from statistics import median
from typing import Any

import msgspec
import pytest

from qdist.core.machine.cluster import Rates
from qdist.core.machine.kernel_rates import attention_seconds
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.loss import loss_rows
from qdist.core.planning.memory import TrainingShape, sizes
from qdist.core.planning.speed import Step, passes, step_seconds

H200 = Rates(matmul_flops_s=673e12, memory_bytes_s=4177e9, link_bytes_s=255e9, host_bytes_s=54e9, source="measured")
"""As `qdist doctor --gpus` measured them on the machines of most rows below."""
LIGER = {"fused_loss": True, "fused_layers": True}
PEFT = LIGER | {"fused_lora": False}
OURS = LIGER | {"fused_lora": True}
ALL = {"checkpointed": 1.0}
TWO = {"ranks": 2, "zero_stage": 2}

MEASURED: list[tuple[str, str, dict[str, Any], float]] = [
    # case, model, what it ran with -> tokens/s, all GPUs. r=64 on all linears, seq_len 512; 16 sequences unless said.
    # docs/runs.md and docs/decisions.md, 2026-11-23.
    ("checkpointing", "llama-7b", OURS | ALL, 12_690),
    ("no checkpointing", "llama-7b", OURS, 18_801),
    ("4 of 8x512", "llama-7b", OURS | {"micro_batch": 8, "micro_batches": 4}, 16_585),
    ("8 of 2x512", "llama-7b", OURS | {"micro_batch": 2, "micro_batches": 8}, 5_130),
    ("8x512", "llama3-8b", OURS | {"micro_batch": 8}, 15_430),
    ("4x512, moments paged", "llama-65b", OURS | ALL | {"micro_batch": 4, "paged": True}, 1_258),
    ("4x512", "llama-65b", OURS | ALL | {"micro_batch": 4}, 1_304),
    ("ZeRO-2 on 2", "llama-7b", OURS | TWO, 35_301),
    ("shards on 2", "llama-7b", OURS | TWO | {"shards": 2}, 33_972),
    ("shards on 2, checkpointing", "llama-7b", OURS | ALL | {"ranks": 2, "shards": 2}, 23_615),
    ("int8 shards on 2", "llama-7b", OURS | ALL | {"ranks": 2, "shards": 2, "bits": 8}, 14_791),
    ("shards on 2, 8x512", "llama-65b", OURS | ALL | {"ranks": 2, "shards": 2, "micro_batch": 8}, 2_671),
    (
        "shards on 2, 4 of 4x512, moments paged",
        "llama-65b",
        OURS | ALL | TWO | {"shards": 2, "micro_batch": 4, "micro_batches": 4, "paged": True},
        2_324,
    ),
    ("2 stages, 16 of 4x512", "llama-65b", OURS | ALL | {"stages": 2, "micro_batch": 4, "micro_batches": 16}, 2_390),
    ("2 stages, 8 of 8x512", "llama-7b", OURS | ALL | {"stages": 2, "micro_batch": 8, "micro_batches": 8}, 20_760),
    ("2 stages, 16 of 4x512", "llama-13b", OURS | {"stages": 2, "micro_batch": 4, "micro_batches": 16}, 17_020),
    ("2 stages, 8 of 4x512", "llama-65b", OURS | ALL | {"stages": 2, "micro_batch": 4, "micro_batches": 8}, 2_404),
    ("sequential on 2, 8x512", "llama-13b", OURS | ALL | {"micro_batch": 8}, 6_882),
    ("summed on 2", "llama-7b", OURS | {"ranks": 2}, 35_095),
    ("summed on 2, checkpointing", "llama-7b", OURS | ALL | {"ranks": 2}, 24_494),
    (
        "int8 shards on 2, 8x512",
        "llama-7b",
        OURS | ALL | {"ranks": 2, "shards": 2, "bits": 8, "micro_batch": 8},
        12_246,
    ),
    ("int8, checkpointing", "llama-7b", OURS | ALL | {"bits": 8}, 7_958),
    ("16 bits, checkpointing", "llama-7b", OURS | ALL | {"bits": 16}, 13_328),
    ("4x2048", "llama-7b", OURS | ALL | {"micro_batch": 4, "seq_len": 2048}, 12_488),
    ("8x512", "qwen2.5-7b", OURS | ALL | {"micro_batch": 8}, 11_753),
    ("8x512", "llama-33b", OURS | ALL | {"micro_batch": 8}, 2_772),
    ("8 layers in host memory", "llama-7b", OURS | {"offloaded": (8,)}, 17_844),
]


STEP = ("shards", "offloaded", "micro_batches", "paged", "graphs")


def predicted(model: str, how: dict[str, Any], rates: Rates = H200) -> float:
    """Tokens a second."""
    facts = from_config(config_of(model), name=model)
    given = {"micro_batch": 16, "micro_batches": 1, "stages": 1, "checkpointed": 0.0} | how
    job = TrainingShape(**(
        {"bits": 4, "rank_r": 64, "targets": ("all-linear",), "seq_len": 512}
        | {key: value for key, value in given.items() if key in TrainingShape.__struct_fields__}
    ))  # fmt: skip
    own = sizes(facts, job)
    one = passes(own, rates, given["micro_batch"], graphs=given.get("graphs", False))
    step = Step(
        counts=((facts.layer_count // given["stages"],),) * given["stages"],
        checkpointed=int(given["checkpointed"] * facts.layer_count),
        pipelined=given["stages"] > 1,
        zero_stage=given.get("zero_stage", 0),
        ranks=given.get("ranks", 1),
        **{key: given[key] for key in STEP if key in given},
    )
    samples = given["micro_batch"] * given["micro_batches"] * given.get("ranks", 1)
    return samples * job.seq_len / step_seconds(own, rates, one, step)


def test_predicted_speeds_are_near_the_measured_ones() -> None:
    rows = [(case, model, seen, predicted(model, how)) for case, model, how, seen in MEASURED]
    table = [f"{m:10} {case:28} {seen:8,.0f} {own:8,.0f} tok/s {own / seen - 1:+6.1%}" for case, m, seen, own in rows]
    print("", *table, sep="\n")
    errors = [abs(own / seen - 1) for _, _, seen, own in rows]
    assert median(errors) < 0.04, "\n".join(table)
    assert max(errors) < 0.125, "\n".join(table)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (ALL, {}),
        (ALL, {"checkpointed": 0.5}),
        (PEFT, LIGER | {"fused_lora": True}),
        ({}, LIGER),
        ({"lora_dropout": True}, {}),
        ({"bits": 8}, {"bits": 4}),
        (LIGER | {"micro_batch": 1}, LIGER | {"micro_batch": 8}),
        ({"ranks": 4, "shards": 4}, {"ranks": 4}),
        ({"stages": 4, "micro_batches": 8}, {"stages": 4, "micro_batches": 64}),
        ({"zero_stage": 3, "ranks": 2}, {"zero_stage": 2, "ranks": 2}),
        ({"optimizer_on_gpu": False}, {}),
        ({"compute_bytes": 4, "bits": 16}, {"bits": 16}),
    ],
)
def test_what_costs_time_costs_time(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert predicted("llama-7b", less) < predicted("llama-7b", more)


@pytest.mark.parametrize("part", ["matmul_flops_s", "memory_bytes_s", "link_bytes_s", "host_bytes_s"])
def test_a_faster_machine_is_no_slower(part: str) -> None:
    faster = msgspec.structs.replace(H200, **{part: 2 * getattr(H200, part)})
    for how in (
        PEFT,
        ALL | {"ranks": 4, "shards": 4},
        {"stages": 4, "micro_batches": 8},
        {"offloaded": (9,)},
    ):
        assert predicted("llama-7b", how, faster) >= predicted("llama-7b", how)


def test_slow_links_make_shards_slow() -> None:
    slow = msgspec.structs.replace(H200, link_bytes_s=5e9)
    sharded = {"ranks": 4, "shards": 4, "micro_batch": 1}
    assert predicted("llama-7b", sharded, slow) < predicted("llama-7b", sharded) / 2


def test_layers_in_host_memory_wait_for_the_bus() -> None:
    slow = msgspec.structs.replace(H200, host_bytes_s=5e9)
    away = {"offloaded": (20,), "micro_batch": 1}
    assert predicted("llama-7b", away, slow) < predicted("llama-7b", away | {"offloaded": (0,)}, slow) / 2
    assert predicted("llama-7b", away) == pytest.approx(predicted("llama-7b", away | {"offloaded": (0,)}), rel=0.1)


GRAPHS = OURS | {"graphs": True}
CAPTURED: list[tuple[dict[str, Any], float]] = [
    # llama-7b on one H200, tokens/s of the passes alone; the first four wrote out a mask.
    (GRAPHS | {"micro_batch": 1}, 11_050),
    (GRAPHS | {"micro_batch": 2}, 14_400),
    (GRAPHS | {"micro_batch": 4}, 16_369),
    (GRAPHS, 18_251),
    (GRAPHS | ALL | {"micro_batch": 2}, 9_894),
]


@pytest.mark.parametrize(("how", "seen"), CAPTURED)
def test_predicted_speeds_of_graphs_are_near_the_measured_ones(how: dict[str, Any], seen: float) -> None:
    assert predicted("llama-7b", how | {"micro_batches": 64}) == pytest.approx(seen, rel=0.06)


def test_a_graph_waits_for_no_python() -> None:
    slow = msgspec.structs.replace(H200, linear_s=2 * H200.linear_s)
    small = {"micro_batch": 1, "micro_batches": 64} | LIGER
    assert predicted("llama-7b", small, slow) < 0.6 * predicted("llama-7b", small)
    captured = small | {"graphs": True}
    assert predicted("llama-7b", captured, slow) == pytest.approx(predicted("llama-7b", captured), rel=0.01)


def test_linears_that_read_one_tensor_share_its_passes() -> None:
    shared = GRAPHS | {"micro_batch": 4, "shared_reads": True}
    assert predicted("llama-7b", shared) > 1.02 * predicted("llama-7b", shared | {"shared_reads": False})


def test_samples_packed_in_a_row_take_attention_longer() -> None:
    facts = from_config(config_of("llama-7b"), name="llama-7b")
    own = sizes(facts, TrainingShape(bits=4, rank_r=64, targets=("all-linear",), seq_len=2048, **LIGER))
    whole, packed = (passes(own, H200, 1, attended=512, packed=how, graphs=True) for how in (False, True))
    attended = attention_seconds(H200.of_kernels, 128, 512, 2.0 * 2048 * 512 * 4096, backward=False)
    assert 0.4 * attended < packed.forward_s[0] - whole.forward_s[0] < attended
    assert packed.head_s == pytest.approx(whole.head_s, rel=0.02)


def test_fp8_products_are_faster_but_not_twice() -> None:
    ratio = predicted("llama-7b", GRAPHS | {"fp8": True}) / predicted("llama-7b", GRAPHS)
    assert 1.2 < ratio < 1.9


def test_a_large_vocabulary_is_read_for_each_chunk_of_the_loss() -> None:
    """Gemma's head of 2 GB is read twice for every 32 rows."""
    assert loss_rows(2048, 262_208, 3840) == 256
    assert loss_rows(512, 32_000, 4096) == 256
    assert loss_rows(8192, 32_000, 4096) == 1024
    assert loss_rows(8, 32_000, 4096) == 8


def test_kernels_are_launched_one_by_one() -> None:
    """A micro-batch that a card could do in no time still takes the launches of its kernels."""
    times = [1 / predicted("llama-7b", {"seq_len": length, "micro_batch": 1}) * length for length in (8, 16)]
    assert times[1] == pytest.approx(times[0], rel=0.35)
