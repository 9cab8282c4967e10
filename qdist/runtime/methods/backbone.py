"""Loads a frozen backbone: NF4, FP4, LLM.int8 or 16-bit; from a folder, or random weights; whole, or a rank's part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import ModelError
from qdist.core.plan import Source
from qdist.core.spec import Quant
from qdist.host.opening import require_files, told
from qdist.runtime.methods.skeleton import fill, skeleton
from qdist.runtime.methods.weights import FolderWeights, ModelWeights, RandomWeights, Weights
from qdist.runtime.recorded_sums import expected_sums
from qdist.runtime.special_tokens import add_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Arrange = Callable[[Any], None]
"""Takes away or shards what a rank does not hold, while the model has no bytes yet."""


def load_backbone(
    source: Source,
    *,
    bits: int,
    quant: Quant,
    dtype: torch.dtype,
    device: torch.device,
    linear_names: tuple[str, ...],
    arrange: Arrange | None = None,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """A frozen transformers causal language model, its decoder linears packed to `bits`.

    dtype: of what is not packed, and of the arithmetic.
    linear_names: leaf names of the decoder linears.
    share: (which, of how many) of the processes that map the same packed folder, and read it on each other's behalf.
    Raises ModelError where packed bytes are not those that were written.
    """
    model = skeleton(source, bits=bits, quant=quant, dtype=dtype, linear_names=linear_names)
    if arrange is not None:
        arrange(model)
    weights: Weights
    if source.kind == "dummy":
        weights = RandomWeights(device, dtype)
    elif source.packed:
        weights = FolderWeights(source.packed, expected_sums(source), share=share)
    else:
        plain = load_plain(source.path, dtype="auto", device=torch.device("cpu"))
        weights = ModelWeights(plain, device=device, dtype=dtype)
    fill(model, weights, device=device)
    add_rows(model, source.new_token_ids, source.vocab_rows)
    return model.requires_grad_(False)


def load_plain(path: str, *, dtype: torch.dtype | str, device: torch.device) -> Any:
    """A model with its weights as they are stored."""
    from transformers import AutoModelForCausalLM

    require_files(Path(path), ModelError)
    with told(path, ModelError, try_="a folder with config.json and *.safetensors"):
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
        )
