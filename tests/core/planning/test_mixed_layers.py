"""Is a model of several kinds of layers counted, and laid out, layer by layer? Against torch and by hand."""

from typing import Any

import msgspec
import pytest

from qdist.core.machine.cards import rates_of
from qdist.core.machine.cluster import hypothetical
from qdist.core.model.adapters.registry import adapter_parameters
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import ALL_LINEAR, LayerRun, LayerShape, Linear, ModelFacts
from qdist.core.model.storage import Packing
from qdist.core.planning.disk import packed_bytes
from qdist.core.planning.inference import footprint
from qdist.core.planning.layer_map import pace
from qdist.core.planning.memory import Share, TrainingShape, budget, load_peak_bytes, sizes
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.planning.speed import Step, passes, step_seconds
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.telemetry.snapshot import model_flops_per_token
from qdist.core.text import GIB, MIB
from tests.core.planning.test_speed import H200

HIDDEN, NARROW, WIDE, VOCAB = 256, 512, 4096, 1024


def shape(inner: int, *, attention: bool = True) -> LayerShape:
    """A Llama's layer; without attention, its MLP alone."""
    heads = 4 * attention
    projections = tuple(
        Linear(name, HIDDEN, HIDDEN, False, "attention_out" if name == "o_proj" else "attention_in")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    mlp = (
        Linear("gate_proj", HIDDEN, inner, False, "mlp_in"),
        Linear("up_proj", HIDDEN, inner, False, "mlp_in"),
        Linear("down_proj", inner, HIDDEN, False, "mlp_out"),
    )
    return LayerShape(
        hidden=HIDDEN, linears=projections * attention + mlp, intermediate=inner, heads=heads, kv_heads=heads,
        head_dim=64 * attention, norms=1 + attention,
    )  # fmt: skip


def model_of(*runs: tuple[LayerShape, int]) -> ModelFacts:
    return ModelFacts(
        name="mixed",
        family="llama",
        layers=tuple(LayerRun(each, count) for each, count in runs),
        vocab=VOCAB,
        max_positions=512,
        tied_embeddings=False,
    )


MIXED = model_of((shape(NARROW), 3), (shape(WIDE), 2), (shape(NARROW), 1))
INNER = (NARROW, NARROW, NARROW, WIDE, WIDE, NARROW)
JOB = TrainingShape(bits=4, double_quant=False, rank_r=8, targets=(ALL_LINEAR,), seq_len=64, fused_lora=True)


def weights(inner: int) -> int:
    return 4 * HIDDEN**2 + 3 * HIDDEN * inner


def packed(inner: int) -> int:
    """NF4: half a byte a weight, four bytes for every 64 of them; two norms in 16 bits."""
    return weights(inner) // 2 + weights(inner) // 64 * 4 + 2 * HIDDEN * 2


def trained(inner: int) -> int:
    return 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + inner))


def planned(facts: ModelFacts, cards: int, mib: int, **settings: Any) -> Plan:
    spec = resolve(nest({"model": "mixed", "steps": 1, "seq_len": 64, "lora.r": 8, "quant.double": False, **settings}))
    source = Source(kind="dummy", path="", config={"model_type": "llama"}, tokenizer="")
    return make_plan(spec, source, facts, hypothetical(cards, mib * MIB, name="RTX 4090"), None, has_liger=True)


def test_layers_are_counted_by_run() -> None:
    assert MIXED.layer_count == 6
    assert MIXED.run_of_layer == (0, 0, 0, 1, 1, 2)
    assert MIXED.counts(0, 6) == MIXED.runs(range(6)) == (3, 2, 1)
    assert MIXED.counts(2, 2) == MIXED.runs((2, 3)) == (1, 1, 0)
    assert MIXED.counts(5, 0) == MIXED.runs(()) == (0, 0, 0)
    assert MIXED.linear_names == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [linear.inputs for linear in MIXED.targeted(("down_proj",))] == [NARROW, WIDE]


def test_parameters_are_those_of_the_model_in_torch() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def config(inner: int) -> Any:
        return transformers.LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=inner, num_attention_heads=4, num_key_value_heads=4,
            num_hidden_layers=6, vocab_size=VOCAB,
        )  # fmt: skip

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(NARROW))
        for index, inner in enumerate(INNER):
            model.model.layers[index] = LlamaDecoderLayer(config(inner), index)
    assert model.num_parameters() == MIXED.parameters
    assert [
        sum(value.numel() for value in layer.parameters()) for layer in model.model.layers
    ] == [MIXED.shapes[run].parameters for run in MIXED.run_of_layer]  # fmt: skip
    assert MIXED.linear_weights == sum(map(weights, INNER))
    assert adapter_parameters(MIXED, 8, (ALL_LINEAR,)) == sum(map(trained, INNER))
    assert adapter_parameters(MIXED, 8, ("down_proj",)) == sum(8 * (inner + HIDDEN) for inner in INNER)


def test_packed_bytes_and_memory_are_sums_over_the_layers_that_a_gpu_has() -> None:
    own, table = sizes(MIXED, JOB), VOCAB * HIDDEN * 2
    assert packed_bytes(MIXED, Packing(bits=4, type="nf4", double=False)) == (
        sum(map(packed, INNER)) + 2 * table + HIDDEN * 2
    )
    share = Share(layers=(1, 2, 0), checkpointed=2, micro_batch=1, gradient_accumulation=2, head=False)
    found = budget(own, share)
    assert found.weights == packed(NARROW) + 2 * packed(WIDE) + table
    assert found.adapter == found.gradients == 4 * (trained(NARROW) + 2 * trained(WIDE))
    # The first two are recomputed and keep what enters them; the third, a wide one, keeps all; a wide one is at work.
    saved = own.layers[1].saved_token
    assert found.activations == 64 * (2 * HIDDEN * 2 + saved) + 2 * (3 * 64 * WIDE + HIDDEN * WIDE)
    less = budget(own, msgspec.structs.replace(share, offloaded=(0, 1, 0)))
    assert found.weights - less.weights == packed(WIDE)
    assert less.gathers - found.gathers == 2 * packed(WIDE)


def test_a_gpu_without_wide_layers_has_no_room_for_one_at_work() -> None:
    own = sizes(MIXED, JOB)
    narrow = Share(layers=(2, 0, 0), checkpointed=2, micro_batch=1, gradient_accumulation=2)
    wide = msgspec.structs.replace(narrow, layers=(0, 2, 0))
    assert budget(own, narrow).activations < budget(own, wide).activations / 3
    assert load_peak_bytes(own, narrow) < load_peak_bytes(own, wide) - 2 * (packed(WIDE) - packed(NARROW))


def test_runs_of_one_shape_are_as_one_run() -> None:
    """All that is planned for Llama-7B, told in three runs; its facts alone differ."""
    whole = from_config(config_of("llama-7b"), name="llama-7b")
    (run,) = whole.layers
    parts = msgspec.structs.replace(whole, layers=tuple(LayerRun(run.shape, count) for count in (1, 10, 21)))
    assert parts.parameters == whole.parameters
    for settings in ({}, {"placement": "split"}, {"placement": "split", "split.schedule": "sequential"}):
        one, three = (planned(facts, 2, 6 * 1024, seq_len=512, **settings) for facts in (whole, parts))
        assert one.tokens_per_second == pytest.approx(three.tokens_per_second, rel=0.02)
        if one.schedule == "1f1b":
            continue  # of ways that are as fast another may be taken
        assert msgspec.structs.replace(three, facts=whole, tokens_per_second=0, alternatives=()) == (
            msgspec.structs.replace(one, tokens_per_second=0, alternatives=())
        )


@pytest.mark.parametrize("wide_first", [True, False])
def test_stages_have_layers_by_the_time_that_these_take(wide_first: bool) -> None:
    runs = (shape(64 * WIDE), 6), (shape(NARROW), 30)
    facts = model_of(*(runs if wide_first else runs[::-1]))
    plan = planned(facts, 2, 8192, placement="split", **{"split.schedule": "1f1b", "seq_len": 512})
    job = msgspec.structs.replace(JOB, seq_len=512, fused_loss=True, fused_layers=True)
    rates = rates_of("RTX 4090")
    assert rates is not None
    one = passes(sizes(facts, job), rates, plan.micro_batch)
    times = [
        one.backward_s[run] + one.forward_s[run] + one.recomputed_s[run] * plan.checkpointing
        for run in facts.run_of_layer
    ]  # fmt: skip

    def slowest(first: int) -> float:
        return max(sum(times[:first]), sum(times[first:]) + one.head_s)

    first = plan.layer_map.count(0)
    assert first < 18 if wide_first else first > 18
    assert slowest(first) == pytest.approx(min(map(slowest, range(1, 36))))


def test_layers_go_to_uneven_gpus_by_their_bytes() -> None:
    facts = model_of((shape(8 * WIDE), 4), (shape(NARROW), 36))
    plan = planned(facts, 2, 2048, placement="split", **{"split.schedule": "sequential"})
    first = plan.layer_map.count(0)
    assert first <= 4
    assert [len(rank.expected) for rank in plan.ranks] == [2]


@pytest.mark.parametrize(
    ("times", "extra", "most", "counts"),
    [
        ([1, 1, 1, 1], [0, 0], [9, 9], (2, 2)),
        ([4, 1, 1, 1, 1], [0, 0], [9, 9], (1, 4)),
        ([1, 1, 1, 1, 4], [0, 0], [9, 9], (4, 1)),
        ([4, 1, 1, 1, 1], [0, 3], [9, 9], (2, 3)),
        ([1, 1, 1, 1, 1, 1], [0, 0, 0], [1, 9, 9], (1, 2, 3)),
        ([5, 1, 1], [0, 0, 0], [9, 9, 9], (1, 1, 1)),
        ([1, 1, 1], [0, 0], [1, 1], None),
        ([1], [0, 0], [9, 9], None),
    ],
)
def test_the_slowest_stage_is_as_fast_as_it_can_be(
    times: list[float], extra: list[float], most: list[int], counts: tuple[int, ...] | None
) -> None:
    assert pace(times, extra, lambda stage, _, number: number <= most[stage]) == counts


def test_a_step_takes_what_its_layers_take() -> None:
    """Of a pipeline the stage with the wide layers; of one GPU all of them."""
    own = sizes(MIXED, JOB)
    one = passes(own, H200, 8)
    times = {
        "forward_s": (1.0, 5.0, 1.0),
        "backward_s": (2.0, 10.0, 2.0),
        "recomputed_s": (1.0, 5.0, 1.0),
        "head_s": 0.5,
        "token_bytes": 0,
    }
    one = msgspec.structs.replace(one, **times)
    step = Step(counts=((3, 2, 1),), checkpointed=4, micro_batches=2, zero_stage=0, ranks=1)
    assert step_seconds(own, H200, one, step) == pytest.approx(2 * (42 + 8 + 0.5), rel=1e-3)
    stages = msgspec.structs.replace(step, counts=((3, 0, 0), (0, 2, 1)), checkpointed=6, pipelined=True)
    assert step_seconds(own, H200, one, stages) == pytest.approx(3 * (2 * 20 + 4 + 0.5), rel=1e-3)
    # A layer without its weights on the GPU is copied to it twice.
    slow = msgspec.structs.replace(H200, host_bytes_s=packed(WIDE) / 100)
    away = msgspec.structs.replace(step, offloaded=(0, 1, 0), checkpointed=0)
    assert step_seconds(own, slow, one, away) == pytest.approx(2 * (100 + 100 + 0.5), rel=1e-3)


def test_a_layer_without_attention_keeps_no_keys_and_costs_no_scores() -> None:
    facts = model_of((shape(NARROW), 1), (shape(NARROW, attention=False), 1))
    first, second = footprint(facts, bits=4, double_quant=False, compute_bytes=2, tokens=100).layers
    projections = 4 * HIDDEN**2 // 2 + 4 * HIDDEN**2 // 64 * 4 + HIDDEN * 2
    assert first - second == projections + 2 * 4 * 64 * 2 * 100
    own = sizes(facts, JOB)
    assert own.layers[1].saved_token < own.layers[0].saved_token
    plan = planned(facts, 1, 1024)
    with_scores = planned(model_of((shape(NARROW), 2)), 1, 1024)
    scores = 6 * plan.seq_len * 4 * 64
    matrices = 4 * 4 * HIDDEN**2 + 6 * 8 * 4 * 2 * HIDDEN
    assert model_flops_per_token(with_scores) - model_flops_per_token(plan) == scores + matrices
    assert plan.ranks[0].expected[0].required < GIB
