"""Shapes of large models with experts, recurrences and many norms, written out by hand from their configurations."""

from msgspec.structs import replace

from qdist.core.model.shapes import Experts, Kept, LayerRun, LayerShape, Linear, ModelFacts, Modules


def attention(hidden: int, queries: int, keys: int, *, bias: bool = False, gated: bool = False) -> tuple[Linear, ...]:
    """The four linears of attention with grouped queries; `gated` doubles the first."""
    return (
        Linear("q_proj", hidden, queries * (2 if gated else 1), bias, "attention_in"),
        Linear("k_proj", hidden, keys, bias, "attention_in"),
        Linear("v_proj", hidden, keys, bias, "attention_in"),
        Linear("o_proj", queries, hidden, bias, "attention_out"),
    )


def gated_mlp(hidden: int, inner: int, within: str = "") -> tuple[Linear, ...]:
    return (
        Linear("gate_proj", hidden, inner, False, "mlp_in", within),
        Linear("up_proj", hidden, inner, False, "mlp_in", within),
        Linear("down_proj", inner, hidden, False, "mlp_out", within),
    )


def experts_of(
    hidden: int, inner: int, count: int, active: int, *, bias: bool = False, transposed: bool = False
) -> Experts:
    matrices = (
        Linear("gate_up_proj", hidden, 2 * inner, bias, "mlp_in"),
        Linear("down_proj", inner, hidden, bias, "mlp_out"),
    )
    return Experts(path="mlp.experts", count=count, active=active, matrices=matrices, transposed=transposed)


def qwen3_moe(
    hidden: int = 2048, inner: int = 768, count: int = 128, active: int = 8, layers: int = 48, vocab: int = 151_936
) -> ModelFacts:
    """Qwen3-30B-A3B."""
    shape = LayerShape(
        hidden=hidden,
        linears=attention(hidden, 32 * 128, 4 * 128),
        intermediate=inner,
        heads=32,
        kv_heads=4,
        head_dim=128,
        qk_norm=True,
        experts=experts_of(hidden, inner, count, active),
        kept=(Kept("mlp.gate", count * hidden, "router"),),
    )
    return _facts("qwen3-30b-a3b", "qwen3_moe", (LayerRun(shape, layers),), vocab)


def gpt_oss() -> ModelFacts:
    """gpt-oss-20b: windows in every other layer, which change no count."""
    shape = LayerShape(
        hidden=2880,
        linears=attention(2880, 64 * 64, 8 * 64, bias=True),
        intermediate=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        attention="eager",
        experts=experts_of(2880, 2880, 32, 4, bias=True, transposed=True),
        kept=(Kept("mlp.router", 32 * 2880 + 32, "router"), Kept("self_attn.sinks", 64, "attention sinks")),
    )
    return _facts("gpt-oss-20b", "gpt_oss", (LayerRun(shape, 24),), 201_088)


def qwen3_5() -> ModelFacts:
    """Qwen3.5-9B: three layers of Gated DeltaNet to one of attention, 32 layers in 16 runs."""
    full = LayerShape(
        hidden=4096,
        linears=(*attention(4096, 16 * 256, 4 * 256, gated=True), *gated_mlp(4096, 12_288)),
        intermediate=12_288,
        heads=16,
        kv_heads=4,
        head_dim=256,
        qk_norm=True,
        attention="repacked",
    )
    recurrent = LayerShape(
        hidden=4096,
        linears=(
            Linear("in_proj_qkv", 4096, 8192, False, "attention_in"),
            Linear("in_proj_z", 4096, 4096, False, "attention_in"),
            Linear("out_proj", 4096, 4096, False, "attention_out"),
            *gated_mlp(4096, 12_288),
        ),
        intermediate=12_288,
        heads=0,
        kv_heads=0,
        head_dim=0,
        mixer="recurrent",
        kept=(
            Kept("linear_attn.conv1d", 8192 * 4, "convolution"),
            Kept("linear_attn.A_log", 32, "decay"),
            Kept("linear_attn.dt_bias", 32, "decay"),
            Kept("linear_attn.in_proj_a", 4096 * 32, "too small to pack"),
            Kept("linear_attn.in_proj_b", 4096 * 32, "too small to pack"),
            Kept("linear_attn.norm", 128, "norm inside"),
        ),
    )
    runs = (LayerRun(recurrent, 3), LayerRun(full, 1)) * 8
    tower = Kept("model.visual", 456_010_480, "vision tower")
    return replace(_facts("qwen3.5-9b", "qwen3_5", runs, 248_320), left_out=(tower,))


def gemma3() -> ModelFacts:
    """Gemma 3 4B's decoder: four norms a layer, a head that is no part of the width, a large tied vocabulary."""
    shape = LayerShape(
        hidden=2560,
        linears=(*attention(2560, 8 * 256, 4 * 256), *gated_mlp(2560, 10_240)),
        intermediate=10_240,
        heads=8,
        kv_heads=4,
        head_dim=256,
        norms=4,
        qk_norm=True,
    )
    return replace(_facts("gemma3-4b", "gemma3", (LayerRun(shape, 34),), 262_208), tied_embeddings=True)


def sharing(layers: int, first: int) -> ModelFacts:
    """A dense model whose layers from `first` on read keys and values of earlier ones."""
    facts = gemma3()
    return replace(facts, layers=(LayerRun(facts.shapes[0], layers),), together_from=first)


def _facts(name: str, family: str, layers: tuple[LayerRun, ...], vocab: int) -> ModelFacts:
    return ModelFacts(
        name=name,
        family=family,
        layers=layers,
        vocab=vocab,
        max_positions=32_768,
        tied_embeddings=False,
        modules=Modules(),
        measured=False,
    )
