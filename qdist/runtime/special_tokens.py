"""Repairs tokenizers whose special tokens are missing or wrong, and gives added tokens their rows."""

from typing import Any, NamedTuple

import torch

PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>", "<unk>",
)  # fmt: skip


class Repair(NamedTuple):
    """What was changed. `new_ids` are vocabulary rows that did not have a meaning before."""

    notes: tuple[str, ...]
    new_ids: tuple[int, ...]
    rows: int | None
    """Rows that the embedding must have, or None where it keeps its own."""


def repair(tokenizer: Any, config: dict[str, Any], *, new_tokens: tuple[str, ...] = ()) -> Repair:
    """Give the tokenizer a bos, an eos that ends a text, and a pad of its own; add `new_tokens`.

    The wrongs seen in the wild: LLaMA 1 conversions with empty bos and eos strings or ids 0 and 1 (tokenizer
    vocabulary: <s> 1, </s> 2) and no pad; GGUF conversions whose eos is the token that opens a turn. A pad is
    taken from the vocabulary where it has a fitting token, since its embedding is never attended to; only
    otherwise is a row added.
    """
    notes: list[str] = []
    vocabulary = tokenizer.get_vocab()
    if not tokenizer.bos_token and "<s>" in vocabulary:
        tokenizer.bos_token = "<s>"
        notes.append("bos was missing: now <s>")
    eos = _better_eos(tokenizer, config, vocabulary)
    if eos is not None:
        notes.append(f"eos was {tokenizer.eos_token or 'missing'!s}: now {eos}")
        tokenizer.eos_token = eos
    known = set(vocabulary)
    if not tokenizer.pad_token:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        pad = next((token for token in PAD_CANDIDATES if token in vocabulary and token not in taken), None)
        if pad is None:
            pad = "[PAD]"
        tokenizer.add_special_tokens({"pad_token": pad})
        notes.append(f"pad was missing: now {pad}")
    if new_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(new_tokens)}, replace_extra_special_tokens=False
        )
    # A token of the tokenizer's own beyond the embedding's end is as new to the model as an added one.
    rows_there = int(config["vocab_size"])
    added = sorted(i for token, i in tokenizer.get_vocab().items() if token not in known or i >= rows_there)
    if added:
        notes.append(f"{len(added)} new vocabulary row(s), starting at the mean and saved with the adapter")
    rows = max(rows_there, added[-1] + 1) if added else None
    return Repair(tuple(notes), tuple(added), rows)


def _better_eos(tokenizer: Any, config: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """The token that should end a text, where the tokenizer's own cannot; None where it can."""
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
    """Give new tokens their embedding rows, input and output, each starting at the mean of the old rows.

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


def align_config(model: Any, tokenizer: Any) -> None:
    """Make the model stop and pad on the tokenizer's tokens."""
    for target in (model.config, model.generation_config):
        if target is None:
            continue
        target.pad_token_id = tokenizer.pad_token_id
        target.bos_token_id = tokenizer.bos_token_id
        ends = target.eos_token_id if isinstance(target.eos_token_id, list) else [target.eos_token_id]
        if tokenizer.eos_token_id not in ends:
            target.eos_token_id = tokenizer.eos_token_id
