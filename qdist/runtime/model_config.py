"""Opens a model folder's config.json with transformers, or says in a sentence why that does not make a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from qdist.core.errors import ModelError

_WRONG = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
"""What transformers ends with on values of another kind or size than it computes with."""


def open_config(folder: Path) -> Any:
    """transformers' configuration. Raises ModelError."""
    from transformers import AutoConfig

    with refused(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """What transformers raises in this block is the fault of the folder's config.json: raise ModelError instead."""
    try:
        yield
    except _WRONG as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"{folder}/config.json: transformers makes no model of it: {' '.join(lines[:2]) or type(error).__name__}",
            try_="its published config.json",
        ) from error
