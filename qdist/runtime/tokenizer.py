"""Opens the tokenizer of a model folder, or says in a sentence why there is none to open."""

import shutil
from pathlib import Path
from typing import Any

from qdist.core.errors import ModelError

BESIDE = "put its tokenizer.json beside the weights"
_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps chat templates beside the default one."""


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file of a tokenizer."""
    return any(any(folder.glob(file)) for file in _FILES)


def copy_beside(path: Path, folder: Path) -> None:
    """Copy a file, or a folder of chat templates, into a folder."""
    if path.is_dir():
        shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, folder / path.name)


def open_tokenizer(folder: Path, lacking: str, *, try_: str = BESIDE) -> Any:
    """transformers' tokenizer.

    lacking: what a user is told where there is none; transformers' reason is added.
    Raises ModelError.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(": ".join(filter(None, (lacking, _reason(error)))), try_=try_) from error


def _reason(error: Exception) -> str:
    """The first line; empty where it only announces the lines behind it."""
    first = str(error).partition("\n")[0].strip()
    return "" if first.endswith(":") else first
