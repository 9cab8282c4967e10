"""How many bytes will a GPU need? Predictions against peaks measured on H200s, terms against what torch saves."""

from typing import Any

import msgspec
import pytest

from qdist.core.model.adapters.qa_lora import QaLoraMethod
from qdist.core.model.adapters.registry import adapter_parameters
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.activations import saved_bytes_per_token
from qdist.core.planning.memory import (
    EIGHT_BIT_CODES,
    GATHERED_LAYERS,
    GATHERED_TABLES,
    MemoryBudget,
    Share,
    Sizes,
    TrainingShape,
    budget,
    eight_bit_moments,
    gather_buffer_bytes,
    load_peak_bytes,
    sizes,
)
from qdist.core.text import GIB
from tests.saved_tensors import saved_by

LIGER = {"fused_loss": True, "fused_layers": True}
NO_CHECKPOINTS, PAGED = {"checkpointed": 0}, {"optimizer_on_gpu": False}
FOUR = {"data_parallel": 4}
SHARDED = FOUR | {"shards": 4, "zero_stage": 2}

ANCHORS: list[tuple[str, str, float, dict[str, Any]]] = [
    # shared/ANCHORS.md: peak GiB that torch allocated; 16x512 tokens a GPU unless said. It does not say which AdamW the
    # stock 7B rows had: they are paged, as in the stock 65B row, since its state alone (1.2 GiB) would overshoot.
    ("stock, checkpointing", "llama-7b", 9.3, PAGED),
    ("stock", "llama-7b", 49.3, NO_CHECKPOINTS | PAGED),
    ("Liger, checkpointing", "llama-7b", 9.1, LIGER),
    ("Liger", "llama-7b", 38.8, NO_CHECKPOINTS | LIGER),
    ("stock, checkpointing, 4x512", "llama-65b", 39.9, PAGED | {"micro_batch": 4}),
    ("Liger, checkpointing, 4x512, paged", "llama-65b", 39.8, LIGER | PAGED | {"micro_batch": 4}),
    ("Liger, checkpointing, 4x512, fused AdamW", "llama-65b", 45.8, LIGER | {"micro_batch": 4}),
    ("ZeRO-2, checkpointing, 4 GPUs", "llama-7b", 9.5, FOUR | {"zero_stage": 2}),
    ("DDP + Liger, 4 GPUs", "llama-7b", 39.1, FOUR | NO_CHECKPOINTS | LIGER),
    ("DDP + Liger, checkpointing, 4 GPUs", "llama-65b", 57.2, FOUR | LIGER),
    # Not as measured: FSDP2 sharded the adapter too, where ours stay whole beside ZeRO's fp32 copy: 4 bytes
    # a parameter, of which each rank had a quarter and ours has a whole and a quarter, and a bucket.
    ("FSDP2 + Liger, checkpointing, 4 GPUs", "llama-7b", 5.6 + 0.8, SHARDED | LIGER),
    ("FSDP2 + Liger, 4 GPUs", "llama-7b", 35.0 + 0.8, SHARDED | NO_CHECKPOINTS | LIGER),
    ("FSDP2 + Liger, checkpointing, 4 GPUs", "llama-65b", 24.9 + 3.2, SHARDED | LIGER),
]


def facts_of(alias: str) -> ModelFacts:
    return from_config(config_of(alias), name=alias)


USUAL: dict[str, Any] = {
    "bits": 4, "rank_r": 64, "targets": ("all-linear",), "seq_len": 512, "micro_batch": 16, "paged": False,
}  # fmt: skip


def predict(alias: str, **settings: Any) -> MemoryBudget:
    return budget(*described(alias, **settings))


def described(alias: str, **settings: Any) -> tuple[Sizes, Share]:
    """A model's sizes and one GPU's share of it; every layer is recomputed unless told."""
    facts = facts_of(alias)
    given = USUAL | {"layers": (facts.layer_count,), "checkpointed": facts.layer_count} | settings
    parts = [
        {key: value for key, value in given.items() if key in kind.__struct_fields__} for kind in (TrainingShape, Share)
    ]
    assert given.keys() == parts[0].keys() | parts[1].keys()
    return sizes(facts, TrainingShape(**parts[0])), Share(**parts[1])


def test_predicted_peaks_are_within_a_tenth_of_the_measured_ones() -> None:
    rows = [(alias, case, gib, predict(alias, **how).total / GIB) for case, alias, gib, how in ANCHORS]
    table = [f"{a:10} {case:42} {gib:5.1f} {own:5.1f} GiB {own / gib - 1:+6.1%}" for a, case, gib, own in rows]
    print("", f"{'model':10} {'case':42} {'seen':>5} {'predicted':>9}", *table, sep="\n")
    assert all(abs(own / gib - 1) < 0.10 for _, _, gib, own in rows), "\n".join(table)


def test_packed_weights_have_the_bytes_of_their_format() -> None:
    facts = facts_of("llama-7b")
    linear, other = 6_476_005_376, facts.parameters - 6_476_005_376
    rows = sum(layer.outputs for layer in facts.linears) * facts.layer_count
    matrices = facts.layer_count * len(facts.linears)
    expected = {
        (4, False): linear // 2 + linear // 64 * 4,
        (4, True): linear // 2 + linear // 64 + linear // (64 * 256) * 4 + 4 * matrices,
        (8, False): linear + 4 * rows,
        (16, False): 2 * linear,
    }
    for (bits, double), size in expected.items():
        assert predict("llama-7b", bits=bits, double_quant=double).weights == size + 2 * other


def test_a_tied_head_costs_nothing() -> None:
    tied, untied = facts_of("qwen3-4b"), msgspec.structs.replace(facts_of("qwen3-4b"), tied_embeddings=False)
    assert untied.embedding_parameters == 2 * tied.embedding_parameters


@pytest.mark.parametrize(
    ("stage", "gradients", "optimizer", "bucket"),
    [(0, 4.0, 8.0, 0.0), (1, 4.0, 12 / 4, 0.0), (2, 4 / 4, 12 / 4, 50e6 * 4), (3, 4 / 4, 12 / 4, 50e6 * 4)],
)
def test_zero_divides_what_its_stage_divides(stage: int, gradients: float, optimizer: float, bucket: float) -> None:
    trained = adapter_parameters(facts_of("llama-7b"), 64, ("all-linear",))
    own = predict("llama-7b", zero_stage=stage, data_parallel=4)
    assert (own.adapter, own.gradients) == (4 * trained, gradients * trained)
    assert (own.optimizer, own.gathers) == (optimizer * trained, bucket)


def test_gradients_in_16_bits_leave_rests_that_are_kept_in_32() -> None:
    plain, narrow = predict("llama-7b", data_parallel=4), predict("llama-7b", data_parallel=4, narrow=True)
    assert narrow.gathers == plain.gathers + 5 * plain.adapter // 4


def test_gradients_count_in_full_when_they_outlive_a_micro_batch() -> None:
    """Alone on a GPU they replace activations as the backward pass goes; accumulated, they stand beside them."""
    once, accumulated = predict("llama-7b"), predict("llama-7b", gradient_accumulation=2)
    assert once.gradients == 0
    assert accumulated.gradients == accumulated.adapter


def test_paged_moments_leave_the_gpu_and_the_fp32_copy_of_zero_stays() -> None:
    trained = adapter_parameters(facts_of("llama-7b"), 64, ("all-linear",))
    assert predict("llama-7b", optimizer_on_gpu=False).optimizer == 0
    assert predict("llama-7b", optimizer_on_gpu=False, zero_stage=2, data_parallel=4).optimizer == trained


def test_gradients_that_stay_between_steps_count_in_full() -> None:
    own = predict("llama-7b", persistent_gradients=True)
    assert own.gradients == own.adapter
    assert predict("llama-7b", persistent_gradients=True, zero_stage=2, data_parallel=4).gradients == own.adapter // 4


@pytest.mark.parametrize(
    ("parameters", "moments"),
    [
        (4095, 8 * 4095),
        (4096, 2 * 4096 + 2 * 4 * 16),
        (4097, 2 * 4097 + 2 * 4 * 17),
        (64 * 11008, 64 * 11008 * 65 // 32),
    ],
)
def test_8_bit_moments_have_a_byte_each_and_scales_from_4096_parameters_on(parameters: int, moments: int) -> None:
    assert eight_bit_moments(parameters) == moments


def test_8_bit_moments_of_a_7b_are_a_quarter_of_those_in_fp32() -> None:
    own, whole = predict("llama-7b", eight_bit=True), predict("llama-7b")
    trained = adapter_parameters(facts_of("llama-7b"), 64, ("all-linear",))
    assert own.optimizer == trained * 65 // 32 + EIGHT_BIT_CODES
    assert whole.total - own.total == 8 * trained - own.optimizer


def test_gradients_beyond_the_activations_they_replace_count() -> None:
    own = predict("llama-65b", micro_batch=4, fused_loss=True)
    kept = 80 * 4 * 512 * 8192 * 2
    assert own.gradients == own.adapter - kept - own.logits


def test_what_the_data_hold_counts_where_it_is_known() -> None:
    """Positions for the layers, learned tokens for the loss; without them sequences are full, and all is learned."""
    usual = {"micro_batch": 4, "checkpointed": 0}
    whole, known = predict("llama-7b", **usual), predict("llama-7b", **usual, positions=4 * 512, learned=4 * 512)
    assert whole == known
    fewer = predict("llama-7b", **usual, positions=4 * 512, learned=100)
    assert fewer.activations == whole.activations
    assert fewer.logits < whole.logits
    assert predict("llama-7b", **usual, positions=4 * 256, learned=100) == predict(
        "llama-7b", **usual, seq_len=256, learned=100
    )


@pytest.mark.parametrize("alias", ["llama-7b", "bloom-7b1", "opt-6.7b", "pythia-6.9b", "qwen3-8b", "glm-4-9b"])
def test_what_saves_memory_saves_memory(alias: str) -> None:
    base = predict(alias, checkpointed=0).total
    assert predict(alias).total < base
    assert predict(alias, checkpointed=0, fused_loss=True).total < base
    assert predict(alias, checkpointed=0, micro_batch=8).total < base
    assert predict(alias, checkpointed=0, optimizer_on_gpu=False).total < base
    assert predict(alias, checkpointed=0, bits=16).total > predict(alias, checkpointed=0, bits=8).total > base
    assert predict(alias, checkpointed=0, lora_dropout=True).total > base


def test_the_total_is_the_sum_of_the_fields_and_fields_are_whole_bytes() -> None:
    own = predict("bloom-560m", context_bytes=5, zero_stage=2, data_parallel=3, shards=1)
    assert own.total == sum(msgspec.structs.asdict(own).values())
    assert all(type(size) is int and size >= 0 for size in msgspec.structs.asdict(own).values())
    assert own.context == 5


def test_partial_checkpointing_lies_between_all_and_none() -> None:
    """All but the last layer cost as much as all: the last is whole when the backward pass begins, either way."""
    needs = [predict("llama-7b", checkpointed=count, fused_lora=True).activations for count in range(33)]
    assert needs[:32] == sorted(needs[:32], reverse=True)
    entering = 16 * 512 * 4096 * 2
    assert needs[31] == needs[32] - entering
    assert needs[0] - needs[1] == needs[10] - needs[11]


@pytest.mark.parametrize("alias", ["llama-65b", "qwen3-4b"])
def test_shards_divide_the_backbone_and_nothing_else(alias: str) -> None:
    whole, part = predict(alias, data_parallel=4, zero_stage=2), predict(alias, **SHARDED)
    tied = facts_of(alias).tied_embeddings
    table = described(alias)[0].table
    assert part.weights == pytest.approx((whole.weights - table * tied) / 4 + table * tied, rel=1e-5)
    assert (part.adapter, part.gradients, part.optimizer) == (whole.adapter, whole.gradients, whole.optimizer)
    buffers = GATHERED_LAYERS * described(alias)[0].widest_layer + GATHERED_TABLES * table * (not tied)
    assert part.gathers - whole.gathers == buffers
    kept_whole = predict(alias, **SHARDED, whole_tables=True)
    assert kept_whole.weights > part.weights or tied


@pytest.mark.parametrize("alias", ["llama-65b", "qwen3-4b", "bloom-7b1"])
def test_stages_hold_between_them_what_one_gpu_holds(alias: str) -> None:
    facts = facts_of(alias)
    third = facts.layer_count // 3
    counts = (third, third, facts.layer_count - 2 * third)
    stages = [
        predict(alias, layers=(count,), checkpointed=count, embedding=at == 0, head=at == 2, pipelined=True)
        for at, count in enumerate(counts)
    ]
    tied = described(alias)[0].table * facts.tied_embeddings
    assert sum(own.weights for own in stages) == predict(alias).weights + tied
    assert sum(own.adapter for own in stages) == predict(alias).adapter


def test_a_stage_keeps_as_many_micro_batches_as_are_in_flight() -> None:
    stage: dict[str, Any] = {"layers": (20,), "checkpointed": 20, "micro_batch": 4, "head": False, "pipelined": True}
    one, four = (predict("llama-65b", **stage, in_flight=count, sends=True) for count in (1, 4))
    hidden = 4 * 512 * 8192 * 2
    assert four.activations - one.activations == 3 * 21 * hidden
    assert predict("llama-65b", **stage, received=2).gathers == 2 * hidden
    divided = predict("llama-65b", **stage, zero_stage=2, data_parallel=2)
    assert divided.gradients == divided.adapter
    assert divided.optimizer == 12 * divided.adapter // 4 // 2


def test_offloaded_layers_leave_the_gpu_but_for_the_two_in_transit() -> None:
    own, away = predict("llama-65b"), predict("llama-65b", offloaded=(30,))
    layer = described("llama-65b")[0].widest_layer
    assert own.weights - away.weights == 30 * layer
    assert away.gathers - own.gathers == 2 * layer


def test_loading_takes_its_part_and_one_matrix_at_a_time() -> None:
    whole, part = load_peak_bytes(*described("llama-65b")), load_peak_bytes(*described("llama-65b", **SHARDED))
    matrix = 8192 * 22_016
    assert whole == pytest.approx(predict("llama-65b").weights + matrix * 2.516, rel=1e-3)
    buffers = gather_buffer_bytes(*described("llama-65b", **SHARDED))
    assert buffers > matrix * 2.516
    assert part == predict("llama-65b", **SHARDED).weights + buffers  # it is gathered once, to be compared
    assert part < 10 * GIB


LLAMA_SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    **{family: LLAMA_SHAPE | {"model_type": family} for family in ("llama", "qwen2", "qwen3", "glm", "glm4", "olmo2")},
    "mistral": LLAMA_SHAPE | {"model_type": "mistral", "sliding_window": None},
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "vocab_size": 128},
    "opt": {
        "model_type": "opt", "hidden_size": 64, "ffn_dim": 160, "num_attention_heads": 4, "vocab_size": 128,
        "max_position_embeddings": 256, "dropout": 0.0,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "vocab_size": 128, "max_position_embeddings": 256,
    },
}  # fmt: skip
BATCH, LENGTH, RANK = 2, 64, 8


@pytest.mark.parametrize("which", ["all linears", "the first"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", TINY)
def test_autograd_saves_what_the_terms_say(family: str, lora_dropout: float, which: str) -> None:
    """In fp32, where a CPU saves what a GPU does. GPT-NeoX: without autocast its two norms share their input."""
    facts = from_config(layered(family, 1), name=family)
    targets = facts.linear_names if which == "all linears" else facts.linear_names[:1]
    three, two = (saved_bytes(family, layers, targets, lora_dropout, bits=16) for layers in (3, 2))
    shared_input = 4 * facts.hidden if family == "gpt_neox" else 0
    own = saved_bytes_per_token(
        facts.shapes[0], bits=16, compute_bytes=4, rank_r=RANK, targets=targets, seq_len=LENGTH,
        fused_layers=False, fused_lora=False, lora_dropout=lora_dropout > 0,
    )  # fmt: skip
    assert own - shared_input == pytest.approx((three - two) / (BATCH * LENGTH), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "glm", "glm4", "olmo2"])
@pytest.mark.parametrize("bits", [4, 16])
def test_autograd_saves_under_autocast_what_the_terms_say(
    family: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft asks whether autocast is on without saying for which device, so that on a CPU it hears no."""
    torch = pytest.importorskip("torch")
    # torch.autocast asks with a device and must hear the truth, or it leaves autocast on behind it.
    truth = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: truth(*device) if device else True)
    facts = from_config(layered(family, 1), name=family)
    targets = facts.linear_names
    three, two = (saved_bytes(family, layers, targets, 0.0, bits=bits, autocast=True) for layers in (3, 2))
    casts = 2 * adapter_parameters(facts, RANK, targets)
    own = saved_bytes_per_token(
        facts.shapes[0], bits=bits, compute_bytes=2, rank_r=RANK, targets=targets, seq_len=LENGTH,
        fused_layers=False, fused_lora=False, lora_dropout=False,
    )  # fmt: skip
    assert own == pytest.approx((three - two - casts) / (BATCH * LENGTH), rel=0.02)


@pytest.mark.parametrize(
    ("family", "autocast"),
    [
        *((family, False) for family in TINY),
        *((family, True) for family in TINY if TINY[family].get("num_key_value_heads")),
    ],
)
def test_our_adapted_linears_save_what_the_terms_say(family: str, autocast: bool) -> None:
    """They cast nothing that is kept: neither inputs to fp32 nor the LoRA matrices to 16 bits.

    Under autocast only with RMS norms: a CPU's layer norm stays in 16 bits, where a GPU's does not.
    """
    facts = from_config(layered(family, 1), name=family)
    targets = facts.linear_names
    three, two = (
        saved_bytes(family, layers, targets, 0.0, bits=16, autocast=autocast, fused_lora=True) for layers in (3, 2)
    )
    own = saved_bytes_per_token(
        facts.shapes[0], bits=16, compute_bytes=2 if autocast else 4, rank_r=RANK, targets=targets, seq_len=LENGTH,
        fused_layers=False, fused_lora=True, lora_dropout=False,
    )  # fmt: skip
    shared_input = 4 * facts.hidden if family == "gpt_neox" and not autocast else 0
    assert own - shared_input == pytest.approx((three - two) / (BATCH * LENGTH), rel=0.02)


@pytest.mark.parametrize(
    ("family", "lora_dropout", "autocast"),
    [("llama", 0.0, False), ("llama", 0.1, False), ("llama", 0.0, True), ("opt", 0.0, False), ("opt", 0.1, False)],
)
def test_pooling_linears_keep_groups_alone(family: str, lora_dropout: float, autocast: bool) -> None:
    """Of 16 inputs, with dropout and without."""
    facts = from_config(layered(family, 1), name=family)
    targets = facts.linear_names
    given = {"bits": 16, "autocast": autocast, "fused_lora": True, "pool": 16}
    three, two = (saved_bytes(family, layers, targets, lora_dropout, **given) for layers in (3, 2))
    own = saved_bytes_per_token(
        facts.shapes[0], bits=16, compute_bytes=2 if autocast else 4, rank_r=RANK, targets=targets,
        adapter=QaLoraMethod(16), seq_len=LENGTH, fused_layers=False, fused_lora=True, lora_dropout=lora_dropout > 0,
    )  # fmt: skip
    assert own == pytest.approx((three - two) / (BATCH * LENGTH), rel=0.02)


def layered(family: str, layers: int) -> dict[str, Any]:
    return TINY[family] | {"n_layer" if family == "bloom" else "num_hidden_layers": layers}


def saved_bytes(family: str, layers: int, *given: Any, **more: Any) -> int:
    return saved_by(layered(family, layers), *given, rank=RANK, batch=BATCH, length=LENGTH, **more)
