"""Models with experts of two narrow layers, with facts made by hand."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qdist.core.model.shapes import Experts, LayerRun, LayerShape, Linear, ModelFacts, Modules
from qdist.core.planning.plan import Source
from qdist.core.spec.sections import Quant
from qdist.runtime.model.packed_experts import PackedMatrices
from qdist.runtime.model.skeleton import Arrange, fill, skeleton
from qdist.runtime.model.weights import RandomWeights

CPU = torch.device("cpu")
VOCAB, HIDDEN = 96, 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 96},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 96,
        "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 64, "intermediate_size": 96,
        "n_group": 1, "topk_group": 1, "mamba_num_heads": 4, "mamba_head_dim": 16,
    },
}  # fmt: skip
"""Beside `_COMMON`, by model type: of a router with and without biases, gates that are interleaved, and none at all."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def config_of(family: str) -> dict[str, Any]:
    """A config.json."""
    return {"model_type": family, **_COMMON, **CONFIGS[family]}


def plain_model(family: str) -> Any:
    """transformers' model in float32, whose experts it computes one by one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = config_of(family)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # wide, so that every part matters, and with biases of the experts among them
            nn.init.normal_(parameter, std=0.5 if "experts" in name else 0.2)
    return model.eval().requires_grad_(False)


@cache
def facts_of_experts(family: str) -> ModelFacts:
    """Facts that say of each layer which experts it has, and which linears attention."""
    model = plain_model(family)
    found = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    layers = next(path.rpartition(".layers.")[0] for path in found) + ".layers"
    runs = [_run(f"{layers}.{index}.", layer, found) for index, layer in enumerate(model.get_submodule(layers))]
    return ModelFacts(
        name=family, family=family, layers=tuple(runs), vocab=VOCAB, max_positions=64, tied_embeddings=False,
        modules=Modules(layers=layers),
    )  # fmt: skip


def _run(prefix: str, layer: nn.Module, found: dict[str, nn.Module]) -> LayerRun:
    paths = [path for path in found if path.startswith(prefix)]
    linears = tuple(
        Linear(path.rpartition(".")[2], module.in_features, module.out_features, False, "attention_in")
        for path, module in layer.named_modules()
        if path.endswith(ATTENTION) and isinstance(module, nn.Linear)
    )
    experts = _experts(paths[0].removeprefix(prefix), found[paths[0]]) if paths else None
    shape = LayerShape(
        hidden=HIDDEN, linears=linears, intermediate=96, heads=4, kv_heads=2, head_dim=16, experts=experts
    )
    return LayerRun(shape, 1)


def _experts(path: str, module: Any) -> Experts:
    transposed = module.is_transposed
    matrices = []
    for name, parameter in module.named_parameters():
        if parameter.dim() == 3:
            outputs, inputs = parameter.shape[1:] if not transposed else reversed(parameter.shape[1:])
            matrices.append(Linear(name, inputs, outputs, module.has_bias, "mlp_in"))
    return Experts(path=path, count=module.num_experts, active=2, matrices=tuple(matrices), transposed=transposed)


def packed_model(family: str, *, bits: int = 4, mxfp4: bool = False, arrange: Arrange | None = None) -> Any:
    """Our model over random weights, in float32."""
    config = config_of(family)
    if mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    source = Source(kind="folder", path="", config=config, tokenizer="")
    model = skeleton(source, bits=bits, quant=Quant(), dtype=torch.float32, facts=facts_of_experts(family))
    if arrange is not None:
        arrange(model)
    fill(model, RandomWeights(CPU, torch.float32), device=CPU)
    return model if arrange else widened(model)


def store_as_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Put random blocks and scales in place of a saved gpt-oss' experts; all that the folder stores then."""
    stored: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        groups = (count, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=draw)
        stored[f"{name}_scales"] = torch.randint(118, 124, groups, dtype=torch.uint8, generator=draw)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return stored


def widened(model: Any) -> Any:
    """The model with biases of experts and plain matrices that are large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() > 1 and parameter.shape[-1] > 1:
            parameter.data.mul_(5)
    for module in model.modules():
        for name, scales in module.named_parameters(recurse=False):
            if name == "scale":
                scales.data.mul_(1 + torch.rand(scales.shape, generator=generator))
    return model


def unpacked_twin(model: Any, family: str) -> Any:
    """transformers' model with the weights that a packed one stands for."""
    twin = plain_model(family)
    for name, parameter in twin.named_parameters():
        parameter.data.copy_(_value(model, name))
    return twin


def _value(model: Any, name: str) -> torch.Tensor:
    within, _, leaf = name.rpartition(".")
    module = model.get_submodule(within)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    held = getattr(module, leaf)
    if isinstance(held, PackedMatrices):
        return held.held(slice(None), torch.float32, CPU)
    unpacked = getattr(module, "unpacked", None)
    return unpacked(CPU) if unpacked and leaf == "weight" else held
