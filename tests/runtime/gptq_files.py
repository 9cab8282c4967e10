"""GPTQ checkpoints of tiny models, rounded to the nearest, in every form that the format has."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdist.core.model.gptq import Gptq, Shape
from qdist.runtime.formats.gptq_folder import Quantized, entries, finish
from qdist.runtime.formats.packed_folder import Entry, entries_of, write_tensors
from qdist.runtime.kernels.gptq_bits import group_of_inputs, pack, pack_zeros
from qdist.runtime.quantize.blueprint import blueprint
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.tiny import save_model


def padded() -> Any:
    """A tokenizer that needs no new row, which stages cannot train."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = "<s>"
    return tokenizer


def quantized(weight: torch.Tensor, gptq: Gptq, shape: Shape | None = None, *, seed: int = 0) -> Quantized:
    """Round a matrix [out, in] to the nearest values of its groups; with `desc_act` the groups are scattered."""
    bits, size = (shape or gptq.shape).bits, (shape or gptq.shape).group_size
    columns, top = weight.t().float(), (1 << bits) - 1
    g_idx = group_of_inputs(columns.shape[0], size)
    if gptq.desc_act:
        g_idx = g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(seed))]
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        part = columns[g_idx == group]
        low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
        if gptq.sym:
            high = torch.maximum(-low, high)
            low = -high
        scales.append(((high - low) / top).clamp_min(1e-4).half())
        zero = torch.full_like(low, (top + 1) // 2) if gptq.sym else (-low / scales[-1].float()).round()
        zeros.append(zero.clamp(gptq.zero_offset, top).int())
    scale, zero = torch.stack(scales), torch.stack(zeros)
    rows = g_idx.long()
    values = ((columns / scale.float()[rows]).round() + zero[rows]).clamp(0, top).int()
    return Quantized(pack(values, bits), pack_zeros(zero, bits, gptq.zero_offset), scale, g_idx)


def save_gptq(folder: Path, gptq: Gptq, family: str = "llama", *, plain: Path | None = None, **changes: Any) -> Path:
    """A checkpoint of a tiny model in one file, with its tokenizer."""
    source = plain or save_model(folder.with_name(f"{folder.name}-source"), family, **changes)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, shape = AutoModelForCausalLM.from_pretrained(source), blueprint(source)
    folder.mkdir()
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    held: list[Entry] = []
    for name, value in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        of_linear = f"{path}.weight" in shape.linears
        width = gptq.of(path) if of_linear else None
        if width is None:
            held += entries_of({name: value} if name in shape.shapes else {})
        elif leaf == "weight":
            linear = quantized(value, gptq, width, seed=len(path))
            bias = model.get_submodule(path).bias
            held += entries(path, linear._replace(bias=bias))
    written = write_tensors(folder, "model.safetensors", held)
    finish(folder, json.loads((source / "config.json").read_text()), gptq, {"model.safetensors": written})
    return folder


def dequantized(model: nn.Module, plain: Any) -> Any:
    """A plain model with the values that a GPTQ model's layers unpack to."""
    for path, module in model.named_modules():
        if hasattr(module, "qzeros"):
            plain.get_submodule(path).weight.data = module.matrix(torch.float32, torch.device("cpu")).detach()
    return plain
