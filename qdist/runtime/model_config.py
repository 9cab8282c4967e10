"""Opens a model folder's config.json with transformers, or says in a sentence why that does not make a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdist.core.errors import ModelError
from qdist.host.opening import require_files, told


def open_config(folder: Path) -> Any:
    """transformers' configuration. Raises ModelError."""
    from transformers import AutoConfig

    require_files(folder, ModelError)
    with refused(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """What transformers raises in this block is the fault of the folder's config.json: raise ModelError instead."""
    with told(f"{folder}/config.json: transformers makes no model of it", ModelError, try_="its published config.json"):
        yield
