"""qdist: fine-tune quantized language models on whatever GPUs are there, with one command."""

from pathlib import Path
from typing import Any


def load(
    run_or_model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_memory: str | int | None = None,
) -> tuple[Any, Any]:
    """A run with its adapter on, or any model, as `(model, tokenizer)`; see `qdist.runtime.infer.load.load`."""
    from qdist.runtime.infer.load import load as heavy_load

    return heavy_load(run_or_model, dtype=dtype, device=device, max_memory=max_memory)


__all__ = ["load"]
