"""Writes a GPTQ checkpoint folder, as AutoGPTQ and GPTQModel read it.

config.json                         with `quantization_config`
quantize_config.json                the same for itself
*.safetensors                       `PATH.qweight`, `.qzeros`, `.scales`, `.g_idx`, `.bias` of each quantized linear
model.safetensors.index.json        which tensor is in which file
checksums.json                      the sums of each tensor, which qdist's readers hold it against
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.gptq import Gptq, to_config
from qdist.core.quoting import command
from qdist.host.checkpoints import QUANTIZE_CONFIG
from qdist.host.files import write_atomic
from qdist.runtime.packed_folder import Entry, Written, entries_of, write_index
from qdist.runtime.recorded_sums import keep_sums


class Quantized(NamedTuple):
    """One linear, [out, in], as the file has it."""

    qweight: torch.Tensor
    """int32 [in * bits / 32, out]."""
    qzeros: torch.Tensor
    """int32 [groups, out * bits / 32]."""
    scales: torch.Tensor
    """float16 [groups, out]."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each input."""
    bias: torch.Tensor | None = None


def entries(path: str, linear: Quantized) -> list[Entry]:
    """What `packed_folder.write_tensors` writes for the linear at a module path."""
    return entries_of({f"{path}.{name}": value for name, value in linear._asdict().items() if value is not None})


def finish(folder: Path, config: Mapping[str, Any], gptq: Gptq, files: Mapping[str, Written]) -> None:
    """Write the configurations and the index: a folder without them is unfinished.

    config: the model's own config.json.
    """
    stated = to_config(gptq)
    write_index(folder, files)
    write_atomic(folder / QUANTIZE_CONFIG, json.dumps(stated, indent=2) + "\n")
    write_atomic(folder / "config.json", json.dumps({**config, "quantization_config": stated}, indent=2) + "\n")
    keep_sums(folder, files.values())
    for name in files:
        (folder / f".{name}.json").unlink(missing_ok=True)


def how_to_use(folder: Path, gptq: Gptq) -> str:
    """The last line of a command that wrote such a folder."""
    bits = ("--bits", gptq.shape.bits) if gptq.shape.bits != 4 else ()
    return f"use it  {command('launch', '--model', folder, '--method', 'gptq-lora', *bits, '--data', 'FILE')}"
