"""Opens a model folder's tokenizer or explains why not; repairs special tokens and adds rows for new ones."""

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.text import counted
from qdist.host.opening import require_files, told
from qdist.host.sources.models import read_json

BESIDE = "put its tokenizer.json beside the weights"
_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
)  # fmt: skip
_OF_FILES = (OSError, ValueError, KeyError)
"""transformers' errors for missing or mismatched files; other classes are failures on their contents."""
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps chat templates other than the default."""


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer file."""
    return any(any(folder.glob(file)) for file in _FILES)


def copy_beside(path: Path, folder: Path) -> None:
    """Copy a file, or a folder of chat templates, into a folder."""
    if path.is_dir():
        shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, folder / path.name)


def open_tokenizer(folder: Path, lacking: str, *, try_: str = BESIDE) -> Any:
    """transformers' tokenizer for a folder.

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
    """Raise ModelError naming the file at fault, if one of them is not a JSON object."""
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
    """The error's first line; empty if it only announces the following lines."""
    first = str(error.__cause__).partition("\n")[0].strip()
    return "" if first.endswith(":") else error.message.removeprefix(": ")


PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>",
    "<unk>",
)  # fmt: skip
_RESERVED = re.compile(r"[<\[]\|?(reserved|unused|extra)[\w-]*?\d+\|?[>\]]")
"""Placeholder tokens that a vocabulary reserves for later use."""


class Repair(NamedTuple):
    """What was changed. `new_ids` are vocabulary rows that had no meaning before."""

    notes: tuple[str, ...]
    new_ids: tuple[int, ...]
    rows: int | None
    """Rows that the embedding must have, or None if unchanged."""


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json that concern text, which a wrapper of other towers has within."""
    return {**config, **(config.get("text_config") or {})}


def repair(tokenizer: Any, config: dict[str, Any], *, new_tokens: tuple[str, ...] = ()) -> Repair:
    """Give the tokenizer a bos, an eos that ends a text, and a pad that the model has a row for; add `new_tokens`.

    The wrongs seen in the wild: LLaMA 1 conversions with empty bos and eos strings or ids 0 and 1 (tokenizer
    vocabulary: <s> 1, </s> 2) and no pad; GGUF conversions whose eos is the token that opens a turn; a pad at the first
    id behind the embedding. No row is ever added for a pad: padding is on the right, or masked, so nothing reads it,
    and adapters with rows of their own are adapters that many programs cannot load.
    """
    notes: list[str] = []
    config = text_settings(config)
    vocabulary, rows_there = tokenizer.get_vocab(), int(config["vocab_size"])
    if not tokenizer.bos_token and "<s>" in vocabulary:
        tokenizer.bos_token = "<s>"
        notes.append("bos was missing: now <s>")
    eos = _better_eos(tokenizer, config, vocabulary)
    if eos is not None:
        notes.append(f"eos was {tokenizer.eos_token or 'missing'!s}: now {eos}")
        tokenizer.eos_token = eos
    had = tokenizer.pad_token_id
    rowless = had is not None and had >= rows_there
    if had is None or rowless:
        was = f"{tokenizer.pad_token} ({had:,}), for which the model has no row" if rowless else "missing"
        tokenizer.pad_token = _pad(tokenizer, vocabulary, rows_there)
        notes.append(f"pad was {was}: now {tokenizer.pad_token}")
    if new_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(new_tokens)}, replace_extra_special_tokens=False
        )
    # A token of the tokenizer's own beyond the embedding's end is as new to the model as an added one.
    added = sorted(
        index
        for token, index in tokenizer.get_vocab().items()
        if (token not in vocabulary or index >= rows_there) and not (rowless and index == had)
    )
    if added:
        notes.append(f"{counted(len(added), 'new vocabulary row')}, starting at the mean and saved with the adapter")
    rows = max(rows_there, added[-1] + 1) if added else None
    return Repair(tuple(notes), tuple(added), rows)


def _pad(tokenizer: Any, vocabulary: dict[str, int], rows: int) -> str:
    """An otherwise meaningless token, else the end-of-text token, which masks and lengths tell from padding."""
    usable = {token for token, index in vocabulary.items() if index < rows}
    free = usable - {tokenizer.eos_token, tokenizer.bos_token}
    named = next((token for token in PAD_CANDIDATES if token in free), None)
    reserved = min(
        (token for token in free if _RESERVED.fullmatch(token)), key=lambda token: vocabulary[token], default=""
    )
    return named or reserved or tokenizer.eos_token or tokenizer.bos_token or min(usable, key=vocabulary.__getitem__)


def _better_eos(tokenizer: Any, config: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """The token that should end a text if the tokenizer's own cannot; None if it can."""
    own = tokenizer.eos_token
    if own and own != tokenizer.bos_token:
        return None
    if "</s>" in vocabulary and (not own or tokenizer.bos_token == "<s>"):
        return "</s>"
    configured = config.get("eos_token_id")
    index = configured[0] if isinstance(configured, list) else configured
    if isinstance(index, int) and 0 <= index < len(tokenizer):
        token = str(tokenizer.convert_ids_to_tokens(index))
        return token if token != own else None
    return None


def add_rows(model: Any, new_ids: tuple[int, ...], rows: int | None) -> None:
    """Add embedding rows for new tokens, input and output, each initialized to the mean of the old rows.

    The mean keeps the new token's logit near the average instead of far above every other (Hewitt 2021).
    """
    if rows is None:
        return
    old_rows = model.get_input_embeddings().weight.shape[0]
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tables = [model.get_input_embeddings()]
    if model.get_output_embeddings() is not None and not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings())
    # Rows that no token names are drawn at random otherwise, anew on each rank.
    fresh = sorted({*new_ids, *range(old_rows, rows)})
    kept = sorted(set(range(old_rows)) - set(fresh))
    with torch.no_grad():
        for table in tables:
            weight = table.weight
            mean = weight[torch.tensor(kept, device=weight.device)].float().mean(dim=0)
            weight[torch.tensor(fresh, device=weight.device)] = mean.to(weight.dtype)


def align_config(model: Any, tokenizer: Any, ends: tuple[int, ...] = ()) -> None:
    """Set the model's stop and pad tokens to the tokenizer's.

    ends: tokens that end an answer beside them, as `Wording` has them.
    """
    for target in (model.config, model.generation_config):
        if target is None:
            continue
        target.pad_token_id = tokenizer.pad_token_id
        target.bos_token_id = tokenizer.bos_token_id
        own = getattr(target, "eos_token_id", None)  # a wrapper's configuration may leave it to its text model's
        known = own if isinstance(own, list) else [own]
        if tokenizer.eos_token_id not in known:
            target.eos_token_id, known = tokenizer.eos_token_id, [tokenizer.eos_token_id]
        if missing := [end for end in ends if end not in known]:
            target.eos_token_id = [*missing, *(end for end in known if end is not None)]
