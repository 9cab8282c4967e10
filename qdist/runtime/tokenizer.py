"""Opens the tokenizer of a model folder, or says in a sentence why there is none to open."""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from qdist.core.errors import ModelError
from qdist.host.opening import require_files, told
from qdist.host.sources import read_json

BESIDE = "put its tokenizer.json beside the weights"
_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
)  # fmt: skip
_OF_FILES = (OSError, ValueError, KeyError)
"""What transformers says of files that are not there or do not go together; of other classes it trips over values."""
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

    require_files(folder, ModelError)
    try:
        with told("", ModelError):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            tokenizer("a")  # some values are looked at only then
            return tokenizer
    except ModelError as error:
        _require_json(folder)
        if type(error.__cause__) in _OF_FILES:
            raise ModelError(": ".join(filter(None, (lacking, _reason(error)))), try_=try_) from error.__cause__
        raise _unreadable(folder, error) from error.__cause__


def _require_json(folder: Path) -> None:
    """Raise ModelError naming the file that is to blame, where one of them is no JSON object."""
    for file in sorted(folder.glob("*token*.json")):
        read_json(file)


def _unreadable(folder: Path, error: ModelError) -> ModelError:
    # tokenizers raises Exception itself for all that it cannot read.
    by_tokenizers = type(error.__cause__) is Exception
    file, library = ("tokenizer.json", "tokenizers") if by_tokenizers else ("the tokenizer", "transformers")
    return ModelError(
        f"{folder}: {file} was written by a newer version of {library} than {metadata.version(library)}, or is "
        f"damaged: {_reason(error)}",
        try_="pip install -U tokenizers transformers",
    )


def _reason(error: ModelError) -> str:
    """The first line; empty where it only announces the lines behind it."""
    first = str(error.__cause__).partition("\n")[0].strip()
    return "" if first.endswith(":") else error.message.removeprefix(": ")
