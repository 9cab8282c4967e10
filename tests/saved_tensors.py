"""What torch really saves for the backward pass of a tiny model, in bytes: the judge of planned activations."""

from typing import Any

import pytest

from qdist.core.model.families import from_config


def saved_by(
    config: dict[str, Any],
    targets: tuple[str, ...],
    dropout: float,
    *,
    rank: int,
    batch: int,
    length: int,
    bits: int,
    autocast: bool = False,
    fused_lora: bool = False,
    pool: int = 1,
    our_experts: bool = False,
) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward one, parameters left out.

    our_experts: whether experts are computed as in a run.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config),
        dtype=torch.bfloat16 if autocast else torch.float32,
    )
    if bits == 4:
        pack_linears(model)
    if our_experts:
        experts = pytest.importorskip("qdist.runtime.model.experts")
        for path, module in model.named_modules():
            if path.endswith(".mlp.experts"):
                experts.compute_experts(module, path)
    pooling = {"use_qalora": True, "qalora_group_size": pool} if pool > 1 else {}
    lora = peft.LoraConfig(r=rank, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM", **pooling)
    if fused_lora:
        fused = pytest.importorskip("qdist.runtime.adapters.attach")
        lora._register_custom_module({torch.nn.Linear: fused.FusedLora})
    model = peft.get_peft_model(model, lora).train()
    if fused_lora:
        fused.share_reads(model, from_config(config, name="tiny"), fused.FusedLora)
    model.enable_input_require_grads()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 128, (batch, length))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def pack_linears(model: Any) -> None:
    """Put NF4 linears of bitsandbytes in place of the plain ones in decoder layers."""
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for leaf, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear) and leaf != "lm_head":
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.bfloat16
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                packed.bias = linear.bias
                setattr(module, leaf, packed.to("cpu"))
    model.is_loaded_in_4bit = True
