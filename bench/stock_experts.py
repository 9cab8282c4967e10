"""Bytes of a mixture of experts "in 4 bits": stock transformers with bitsandbytes beside qdist, on this machine.

    python bench/stock_experts.py [--model qwen3-30b-a3b] [--layers 2] [--device cuda]

A random checkpoint of a few layers is written in 16 bits, then loaded by both. Bytes of a layer are measured, and the
whole model is the sum of its layers and tables.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qdist.core.model.aliases import lookup
from qdist.core.text import format_bytes


def main() -> None:
    """Write the checkpoint, load it twice, print the bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    config = lookup(given.model).config
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write(base, dict(config) | {"num_hidden_layers": given.layers})
        for name, load in (("stock", stock), ("qdist", ours)):
            report(name, load(base, given.device), given.layers, config["num_hidden_layers"])


def write(folder: Path, config: dict[str, Any]) -> None:
    """A random checkpoint in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(config.pop("model_type"), **config)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)


def stock(folder: Path, device: str) -> Any:
    """As its documentation says to load a model for QLoRA."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )


def ours(folder: Path, device: str) -> Any:
    """As a rank of `qdist launch` loads it."""
    from qdist.core.model.storage import Packing
    from qdist.core.planning.plan import Source
    from qdist.core.spec.sections import Quant
    from qdist.host.sources.models import read_json
    from qdist.runtime.model.describe import facts_of
    from qdist.runtime.model.skeleton import load_backbone
    from qdist.runtime.quantize.pack import pack

    packed, config = folder.with_name("packed"), read_json(folder / "config.json")
    pack(folder, packed, Packing(bits=4), name=folder.name)
    source = Source(kind="folder", path=str(folder), packed=str(packed), config=config, tokenizer="")
    facts = facts_of(config, name=folder.name)
    return load_backbone(
        source, bits=4, quant=Quant(), dtype=torch.bfloat16, device=torch.device(device), facts=facts
    )  # fmt: skip


def report(name: str, model: Any, loaded: int, layers: int) -> None:
    """Print the bytes of one layer by dtype, and those of the whole model."""
    inside, outside = Counter[str](), 0
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        size = tensor.numel() * tensor.element_size()
        if ".layers." in path:
            inside[str(tensor.dtype).removeprefix("torch.")] += size
        else:
            outside += size
    each = {dtype: size // loaded for dtype, size in inside.items()}
    parts = ", ".join(f"{format_bytes(size)} {dtype}" for dtype, size in each.items())
    whole = sum(each.values()) * layers + outside
    print(f"{name:6} a layer: {parts}; {layers} layers and tables: {format_bytes(whole)}", flush=True)


if __name__ == "__main__":
    main()
