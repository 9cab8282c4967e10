"""Plans of experts, hybrids and layers that stay together: bytes by other arithmetic, targets, refusals, words."""

from typing import Any

import pytest
from msgspec.structs import replace

from qdist.cli.views.plan import plan_lines
from qdist.core.errors import ModelError, SpecError
from qdist.core.model.adapters.registry import adapter_parameters, expert_adapter_parameters
from qdist.core.model.aliases import config_of
from qdist.core.model.shapes import UNPACKED_EXPERTS, Kept, LayerRun, ModelFacts
from qdist.core.model.storage import Packing, experts_bytes, packing_of
from qdist.core.planning.disk import packed_bytes
from qdist.core.planning.inference import footprint
from qdist.core.planning.memory import UNMEASURED_SHARE, Share, TrainingShape, budget, load_peak_bytes, sizes
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.planning.unsupported import require_dense
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.telemetry.snapshot import model_flops_per_token
from qdist.core.text import GIB
from tests.models import gemma3, gpt_oss, qwen3_5, qwen3_moe, sharing
from tests.plans import CPU, gpus, machine

BOTH = ("all-linear", "experts")
MXFP4: dict[str, Any] = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def planned(
    facts: ModelFacts,
    cluster: Any,
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **more: Any,
) -> Plan:
    spec = resolve({"steps": 5, "model": facts.name, "lora": {"r": 16}}, nest(settings or {}))
    source = Source(kind="dummy", path="", config=config or {"model_type": facts.family}, tokenizer="")
    return make_plan(spec, source, facts, cluster, None, has_liger=cluster.device == "cuda", **more)


def part(facts: ModelFacts, **settings: Any) -> tuple[Any, Share]:
    job = {"bits": 4, "rank_r": 16, "targets": ("all-linear",), "seq_len": 512, "fused_lora": True} | settings
    counts = facts.counts(0, facts.layer_count)
    return sizes(facts, TrainingShape(**job)), Share(layers=counts, checkpointed=facts.layer_count, micro_batch=4)


def test_experts_are_packed_one_by_one() -> None:
    """A matrix of 768 x 2048: 24,576 absmaxes, 96 absmaxes of theirs, and an offset."""
    experts = qwen3_moe().shapes[0].experts
    assert experts is not None
    down, up = 768 * 2048, 2 * 768 * 2048
    double = sum(weights // 2 + weights // 64 + 4 * (weights // 64 // 256) + 4 for weights in (down, up))
    plain = sum(weights // 2 + 4 * (weights // 64) for weights in (down, up))
    assert experts_bytes(experts, bits=4) == 128 * double
    assert experts_bytes(experts, bits=4, double=False) == 128 * plain
    assert experts_bytes(experts, bits=8) == 128 * (down + up + 4 * (2048 + 2 * 768))
    assert experts_bytes(experts, bits=16) == 128 * 2 * (down + up)


def test_an_expert_whose_absmaxes_fill_no_block_of_their_own_pads_it() -> None:
    experts = qwen3_moe(hidden=192, inner=96, count=4, active=2).shapes[0].experts
    assert experts is not None
    up, down = 2 * 96 * 192, 96 * 192  # 576 and 288 absmaxes: 3 and 2 blocks of 256
    assert experts_bytes(experts, bits=4) == 4 * (up // 2 + 576 + 4 * 3 + 4 + down // 2 + 288 + 4 * 2 + 4)


def test_qwen3_moe_takes_sixteen_and_a_half_gigabytes_at_four_bits() -> None:
    facts = qwen3_moe()
    assert facts.parameters == 30_532_122_624  # as its card says: 30.5 B
    assert facts.expert_parameters == 48 * 128 * 3 * 768 * 2048
    own = budget(*part(facts)).weights
    in_16_bits = 2 * (2 * 151_936 * 2048 + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048)
    in_4_bits = (facts.expert_parameters + 48 * 2048 * (2 * 32 * 128 + 2 * 4 * 128)) * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert own == pytest.approx(in_4_bits + in_16_bits, rel=1e-5)
    assert own == pytest.approx(16.6e9, rel=0.01)


def test_mxfp4_is_a_byte_for_two_weights_and_one_for_thirty_two_beside_linears_in_sixteen_bits() -> None:
    facts = gpt_oss()
    assert facts.parameters == 20_914_757_184
    experts, weights = facts.shapes[0].experts, 32 * 3 * 2880 * 2880
    assert experts is not None
    assert experts_bytes(experts, bits=16, mxfp4=True) == weights * 17 // 32
    own = budget(*part(facts, bits=16, mxfp4=True)).weights
    assert own == 24 * weights * 17 // 32 + 2 * (facts.parameters - 24 * weights)
    assert packed_bytes(facts, packing_of(resolve(), MXFP4)) == own


def test_a_checkpoint_in_mxfp4_is_trained_on_as_it_comes() -> None:
    mxfp4 = Packing(bits=4, type="mxfp4", double=False)
    assert packing_of(resolve(), MXFP4) == mxfp4
    assert (mxfp4.linear_bits, mxfp4.method, str(mxfp4)) == (16, "mxfp4", "mxfp4")
    assert packing_of(resolve({"load_format": "dummy"}), config_of("gpt-oss-20b")) == mxfp4
    assert packing_of(resolve(), {"model_type": "gpt_oss"}) == Packing(bits=4)  # a copy in 16 bits
    for settings in ({"bits": 8}, {"quant": {"type": "fp4"}}, {"quant": {"double": False}}):
        with pytest.raises(SpecError, match="in MXFP4"):
            packing_of(resolve(settings), MXFP4)


def test_all_experts_are_unpacked_for_a_grouped_product_and_one_at_a_time_elsewhere() -> None:
    facts = qwen3_moe()
    grouped, in_turn = (part(facts, grouped=own)[0].layers[0].working for own in (True, False))
    assert grouped == 128 * 2 * 768 * 2048 * 2
    assert in_turn == 2048 * 4096 * 2  # the largest linear
    assert load_peak_bytes(*part(facts)) < budget(*part(facts)).weights + 30_000_000  # one matrix at a time


def test_tokens_keep_as_many_pairs_as_experts_they_visit() -> None:
    """Whatever the router does: 8 x (2 x 768 + narrow products) elements, and the router's own."""
    facts = qwen3_moe()
    none, both = (part(facts, targets=targets)[0].layers[0].saved_token for targets in (("all-linear",), BOTH))
    dense = replace(facts.shapes[0], experts=None)
    without = part(replace(facts, layers=(LayerRun(dense, 48),)))[0].layers[0].saved_token
    assert none - without == 2 * 8 * 1536 + 4 * 128 + 16 * 8
    assert both - none == 2 * (8 * 2 * 16 + 2048)


def test_adapters_on_experts_are_counted_in_pefts_layout() -> None:
    """A [experts x r, in] and B [out, r x experts], for both matrices."""
    facts = qwen3_moe()
    linears, every = (adapter_parameters(facts, 16, targets) for targets in (("all-linear",), BOTH))
    assert linears == 48 * 16 * (2048 + 4096 + 2 * (2048 + 512) + 4096 + 2048)
    assert every - linears == 48 * 128 * 16 * (2048 + 1536 + 768 + 2048) == expert_adapter_parameters(facts, 16, BOTH)
    assert adapter_parameters(facts, 16, ("experts.down_proj",)) == 48 * 128 * 16 * (768 + 2048)
    plan = planned(facts, gpus(1, 141), {"lora.targets": BOTH})
    assert (plan.adapter_parameters, plan.expert_adapter_parameters) == (every, every - linears)
    (held,) = plan.ranks[0].expected
    assert (held.adapter, held.optimizer + held.pageable) == (4 * every, 8 * every)


@pytest.mark.parametrize(
    ("facts", "targets", "said"),
    [
        (qwen3_moe(), ("gate",), "gate of qwen3-30b-a3b is not adapted: router"),
        (
            qwen3_moe(),
            ("all-linear", "experts.up_proj"),
            "among q_proj, k_proj, v_proj, o_proj, experts, experts.gate_up",
        ),
        (gemma3(), ("experts",), "gemma3-4b has no experts, which lora.targets names"),
        (qwen3_5(), ("in_proj_a", "q_proj"), "in_proj_a of qwen3.5-9b is not adapted: too small to pack"),
    ],
)
def test_a_target_that_is_kept_or_not_there_is_refused_with_its_reason(
    facts: ModelFacts, targets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        facts.targeted(targets)
    for way in refused.value.ways:
        facts.targeted(way["lora.targets"])


@pytest.mark.parametrize(
    ("facts", "settings", "said"),
    [
        (
            qwen3_moe(),
            {"lora.targets": BOTH, "lora.dropout": 0.1},
            "lora.dropout=0.1 does not go with adapters on experts",
        ),
        (qwen3_moe(), {"method": "qa-lora"}, "method=qa-lora is for dense models: qwen3-30b-a3b has 128 experts"),
        (qwen3_moe(), {"method": "gptq-lora"}, "method=gptq-lora is for dense models"),
        (gpt_oss(), {"bits": 8}, "the experts of gpt-oss-20b are in MXFP4"),
    ],
)
def test_what_experts_rule_out_is_refused_with_a_way_that_works(
    facts: ModelFacts, settings: dict[str, Any], said: str
) -> None:
    config = MXFP4 if facts.family == "gpt_oss" else None
    with pytest.raises(SpecError, match=said) as refused:
        planned(facts, gpus(1, 141), settings, config)
    assert refused.value.try_.startswith("--"), refused.value.try_


@pytest.mark.parametrize("inside", [False, True])
def test_the_balance_loss_of_routers_is_refused_wherever_a_configuration_asks_for_it(inside: bool) -> None:
    facts, asked = qwen3_moe(), {"output_router_logits": True, "router_aux_loss_coef": 0.001}
    with pytest.raises(SpecError, match=r"balance loss of its routers \(output_router_logits is true, times 0.001\)"):
        planned(facts, gpus(1, 141), config={"text_config": asked} if inside else asked)
    planned(facts, gpus(1, 141), config=asked | {"router_aux_loss_coef": 0})
    planned(facts, gpus(1, 141), config=asked | {"output_router_logits": False})


def test_experts_that_would_stay_in_16_bits_are_refused_where_fewer_were_asked_for() -> None:
    facts = qwen3_moe()
    (run,) = facts.layers
    assert run.shape.experts is not None
    lost = Kept("mlp.experts", run.shape.experts.parameters, UNPACKED_EXPERTS)
    layers = (LayerRun(replace(run.shape, experts=None, kept=(lost,)), run.count),)
    with pytest.raises(SpecError, match="97% of the weights of its decoder layers would stay in 16 bits") as refused:
        planned(replace(facts, layers=layers), gpus(1, 141))
    assert refused.value.try_ == "--bits 16"
    planned(replace(facts, layers=layers), gpus(1, 141), {"bits": 16})


def test_a_loss_of_logits_besides_the_cross_entropy_is_refused_before_anything_is_downloaded() -> None:
    with pytest.raises(SpecError, match=r"z_loss_coefficient=0.001 in the config.json of .* adds to the cross entropy"):
        planned(qwen3_moe(), gpus(1, 141), config={"z_loss_coefficient": 0.001})
    planned(qwen3_moe(), gpus(1, 141), config={"z_loss_coefficient": 0.0})


def test_layers_that_share_keys_and_values_stay_in_one_stage() -> None:
    settings = {"placement": "split", "split.schedule": "1f1b", "gpus_per_group": 2}
    free, held = (planned(sharing(30, first), gpus(2, 80), settings).layer_map for first in (29, 10))
    assert free.count(0) > 10
    assert held == (0,) * 10 + (1,) * 20
    one = planned(sharing(30, 20), machine(24, 80), {"split.schedule": "sequential"}).layer_map
    assert len(set(one[20:])) == 1


def test_a_layout_that_would_cut_them_is_dropped_with_that_reason() -> None:
    plan = planned(sharing(30, 1), gpus(4, 80))
    (lost,) = (own for own in plan.alternatives if own.schedule == "1f1b" and own.gpus_per_group == 4)
    assert lost.reason == (
        "4 stages need at least as many layers, and gemma3-4b has 30 layers, of which those from 1 on stay together, "
        "as they read keys and values of earlier ones"
    )


def test_a_decoder_that_cannot_be_cut_is_split_nowhere() -> None:
    facts = replace(gemma3(), unsplit="hands four streams from layer to layer")
    plan = planned(facts, gpus(2, 80))
    split = [own for own in plan.alternatives if own.placement == "split"]
    assert split
    assert {own.reason for own in split} == {
        "gemma3-4b cannot be split: the model hands four streams from layer to layer"
    }
    with pytest.raises(SpecError, match="cannot be split") as refused:
        planned(facts, gpus(2, 80), {"placement": "split"})
    assert "placement" in refused.value.try_


def test_a_family_that_nobody_measured_has_a_margin_and_a_note() -> None:
    facts = gemma3()
    own, measured = (budget(*part(each)) for each in (facts, replace(facts, measured=True)))
    assert own.margin == int(UNMEASURED_SHARE * own.activations)
    assert own.total - measured.total == own.margin
    noted, silent = (planned(each, gpus(1, 80)).notes for each in (facts, replace(facts, measured=True)))
    assert any("of gemma3 are computed from its shapes, not measured yet: 10 %" in note for note in noted)
    assert not any("measured" in note for note in silent if "activations" in note)


def test_the_fused_loss_of_a_large_vocabulary_takes_a_chunk_of_it() -> None:
    """Of 8,192 tokens the logits of 262,208 words are 8.6 GB in float32; a chunk is as wide as hidden states are."""
    facts = gemma3()
    whole, fused = (
        budget(part(facts, fused_loss=own)[0], replace(part(facts)[1], micro_batch=16)).logits for own in (False, True)
    )
    assert whole > 8192 * 262_208 * 10
    assert fused < 8192 * 262_208 * 12 / 100


def test_fast_kernels_of_recurrences_are_planned_where_they_are() -> None:
    slow, fast = (planned(qwen3_5(), gpus(1, 141), {"micro_batch": 4}, no_fla=why) for why in ("is not installed", ""))
    assert (slow.recurrence, fast.recurrence) == ("torch", "fla")
    assert any("24 of 32 layers are recurrent and run torch's slow operations" in note for note in slow.notes)
    assert not any("are recurrent" in note for note in fast.notes)
    assert fast.ranks[0].expected[0].activations < 0.55 * slow.ranks[0].expected[0].activations
    assert fast.tokens_per_second > slow.tokens_per_second
    assert planned(qwen3_moe(), gpus(1, 141), no_fla="").recurrence is None
    assert planned(qwen3_5(), CPU, no_fla="").recurrence == "torch"


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "gate_up_proj", "mlp.experts", "w1"])
def test_matrices_of_an_mlp_as_targets_are_answered_with_experts(name: str) -> None:
    with pytest.raises(ModelError) as refused:
        qwen3_moe().require_targets(("q_proj", name))
    assert refused.value.ways == ({"lora.targets": ("q_proj", "experts")},)


def test_gptq_of_experts_is_refused_with_what_packs_them() -> None:
    with pytest.raises(ModelError, match="GPTQ is for dense models: qwen3-30b-a3b has 128 experts") as refused:
        require_dense(qwen3_moe(), what="GPTQ")
    assert refused.value.try_ == "qdist quantize MODEL --method nf4, for experts too"


def test_a_plan_says_what_its_experts_hold_and_what_is_kept() -> None:
    lines = plan_lines(planned(qwen3_moe(), gpus(1, 141), {"lora.targets": BOTH}))
    assert (
        "experts  48 layers of 128, 8 active: 29.0 B of 30.5 B parameters; memory is the same however tokens are routed"
        in lines
    )
    assert "adapter  LoRA r=16 alpha=16: 13.4 M parameters on linears, 629.1 M on experts" in lines
    assert "kept     12.6 M parameters not packed: router" in lines
    attention_alone = plan_lines(planned(qwen3_moe(), gpus(1, 141)))
    assert "adapter  LoRA r=16 alpha=16: 13.4 M parameters on linears, none on experts" in attention_alone
    hybrid = plan_lines(planned(qwen3_5(), gpus(1, 141), no_fla=""))
    kept = "too small to pack (6.3 M), convolution (786,432), norm inside, decay"
    assert f"kept     7.1 M parameters not packed: {kept}" in hybrid
    assert "left out model.visual (456.0 M): not needed for text" in hybrid
    assert "kernels  recurrence by flash-linear-attention" in hybrid
    assert plan_lines(planned(gpt_oss(), gpus(1, 80), config=MXFP4))[0].split(", ")[1:3] == [
        "experts in MXFP4 as they come", "linears in 16 bits",
    ]  # fmt: skip


@pytest.mark.parametrize(("gib", "targets"), [(24, ("all-linear",)), (32, BOTH)])
def test_qwen3_moe_fits_under_the_caps_that_peers_need(gib: int, targets: tuple[str, ...]) -> None:
    plan = planned(qwen3_moe(), gpus(1, 141), {"max_memory": f"{gib}GiB", "lora.targets": targets})
    assert plan.ranks[0].expected[0].required < gib * GIB


def test_experts_cost_their_active_share_and_the_unpacking_of_all() -> None:
    """Twice as many experts of which as many are active: slower by what is unpacked, not twice as slow."""
    few, many, busy = (
        planned(qwen3_moe(count=count, active=active), gpus(1, 141)).tokens_per_second
        for count, active in ((64, 8), (128, 8), (64, 16))
    )
    assert 0.6 * few < many < few
    assert busy < few


def test_work_counts_the_experts_that_a_token_visits() -> None:
    """3 B of 30 B: 8 of 128 experts, attention and the head; and their adapters alike."""
    plan = planned(qwen3_moe(), gpus(1, 141), {"lora.targets": BOTH})
    weights = 48 * (2048 * (2 * 4096 + 2 * 512) + 8 * 3 * 768 * 2048) + 151_936 * 2048
    adapter = plan.adapter_parameters - plan.expert_adapter_parameters * 120 / 128
    scores = 6 * 512 * 48 * 32 * 128
    assert model_flops_per_token(plan) == pytest.approx(4 * weights + 6 * adapter + scores)


def test_generation_unpacks_all_experts_of_a_layer() -> None:
    facts = qwen3_moe()
    own = footprint(facts, bits=4, double_quant=True, compute_bytes=2, tokens=100)
    dense = footprint(
        replace(facts, layers=(LayerRun(replace(facts.shapes[0], experts=None), 48),)),
        bits=4, double_quant=True, compute_bytes=2, tokens=100,
    )  # fmt: skip
    assert own.everywhere - dense.everywhere > 128 * 2 * 768 * 2048 * 2 - 100_000_000
    assert sum(own.layers) > 15e9
