"""Loads a frozen backbone: NF4, FP4, LLM.int8 or 16-bit; pretrained, or random weights made layer by layer."""

from typing import Any

import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.core.plan import Source
from qdist.core.spec import Quant
from qdist.runtime.methods.int8 import forget_inputs
from qdist.runtime.special_tokens import add_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_backbone(
    source: Source, *, bits: int, quant: Quant, dtype: torch.dtype, device: torch.device, linear_names: tuple[str, ...]
) -> Any:
    """A frozen transformers causal language model on one device, its decoder linears packed to `bits`.

    dtype: of what is not packed, and of the arithmetic.
    linear_names: leaf names of the decoder linears, for random weights.
    """
    config = _quantization(bits, quant, dtype)
    if source.kind == "dummy":
        model = _random(source, config, dtype=dtype, device=device, linear_names=linear_names)
    else:
        model = _pretrained(source.path, config, dtype=dtype, device=device)
    add_rows(model, source.new_token_ids, source.vocab_rows)
    model.requires_grad_(False)
    forget_inputs(model)
    model.config.use_cache = False
    return model


def load_plain(path: str, *, dtype: torch.dtype | str, device: torch.device) -> Any:
    """A model with its weights as they are stored."""
    return _pretrained(path, None, dtype=dtype, device=device)


def _quantization(bits: int, quant: Quant, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else None


def _pretrained(path: str, quantization: Any, *, dtype: torch.dtype | str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantization, dtype=dtype, device_map={"": device}, local_files_only=True
        )
    except OSError as error:
        raise ModelError(f"{path}: {error}", try_="a folder with config.json and *.safetensors") from error


def _random(
    source: Source, quantization: Any, *, dtype: torch.dtype, device: torch.device, linear_names: tuple[str, ...]
) -> Any:
    """A model of the given shape with random weights, no more than one unpacked matrix in memory at a time.

    Matrices are N(0, 0.02), norms 1, biases 0: activations stay finite however deep the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(source.config)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for path in [path for path, _ in model.named_modules()]:
        module = model.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_values(name, parameter, dtype, device, generator), requires_grad=False))
        leaf = path.rpartition(".")[2]
        if quantization is not None and isinstance(module, nn.Linear) and leaf in linear_names:
            model.set_submodule(path, _packed(module, quantization, dtype, device))
    model.to(device)
    model.tie_weights()
    if quantization is not None:
        # What from_pretrained sets, and what PEFT looks at to choose its layers.
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
        model.is_quantized = True
        model.config.quantization_config = quantization
    return model.eval()


def _values(
    name: str, parameter: torch.Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    if parameter.dim() < 2:
        return torch.full(parameter.shape, 0.0 if name == "bias" else 1.0, dtype=dtype, device=device)
    return torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)


def _packed(linear: nn.Linear, quantization: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """bitsandbytes' layer over a linear's weights; moving it to the device is what packs them."""
    import bitsandbytes as bnb

    bias = linear.bias is not None
    layer: nn.Module
    if quantization.load_in_4bit:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias,
            compute_dtype=dtype,
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
            module=layer,
        )
    else:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(linear.weight.data.to("cpu"), requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to(device)
