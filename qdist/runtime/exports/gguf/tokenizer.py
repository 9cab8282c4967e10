"""A transformers tokenizer in GGUF form: tokens, types, merges or scores, and the pre-tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf

from qdist.core.errors import ModelError
from qdist.runtime.data.tokenizer import open_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS, _GPT2, _BYTES = "digits one by one", "GPT-2's words", "bytes"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"


class _Rules(NamedTuple):
    """How text is split, and whether a word that is a token is taken whole before any merge."""

    steps: tuple[str, ...]
    whole_words: bool = False


_NAMES = {
    _Rules((_GPT2,)): "gpt-2",
    _Rules((_DIGITS, _GPT2)): "smollm",
    _Rules((_LLAMA3, _BYTES), True): "llama-bpe",
    _Rules((_LLAMA3, _BYTES)): "smaug-bpe",
    _Rules((_QWEN2, _BYTES)): "qwen2",
    _Rules((_TEKKEN, _BYTES), True): "tekken",
}


def pre_of(backend: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """llama.cpp's name for a byte-level tokenizer's rules, or None and a note.

    backend: what tokenizer.json holds. NFC, which Qwen has, is passed over: llama.cpp leaves text as it is, and text
    that people write is NFC already.
    """
    rules = _Rules(tuple(_step(step) for step in flat(backend["pre_tokenizer"], "pretokenizers")),
                   bool(backend["model"].get("ignore_merges")))  # fmt: skip
    normalizers = [step["type"] for step in flat(backend["normalizer"], "normalizers") if step["type"] != "NFC"]
    name = _NAMES.get(rules)
    if name is None:
        return None, ("llama.cpp has no name for the way this tokenizer cuts text, and will use its default: "
                      "some texts will become other tokens",)  # fmt: skip
    if normalizers:
        return name, (f"llama.cpp does not normalize text ({', '.join(normalizers)}): some texts become other tokens",)
    return name, ()


def flat(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a possibly nested sequence, or a single step."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in flat(part, key)]
    return [step]


def _step(step: dict[str, Any]) -> str:
    """A step as named in `_NAMES`; other steps as JSON."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else _BYTES
    if kind == "Digits" and step["individual_digits"]:
        return _DIGITS
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        regex = step["pattern"].get("Regex")
        if isinstance(regex, str):
            return regex
    return json.dumps(step, sort_keys=True)


_TYPES = gguf.TokenType
_NO_SCORE = -1000.0
"""Score of tokens that no merge produces: llama.cpp never reaches them by merging."""
_PROBE = "a"


Templates = str | tuple[dict[str, str], ...] | None
"""A chat template, or several by name."""


class Vocabulary(NamedTuple):
    """A file's vocabulary."""

    model: Literal["gpt2", "llama"]
    """Byte-level BPE, or SentencePiece's BPE with spaces as U+2581."""
    pre: str | None
    """llama.cpp's name of the pre-tokenizer, for gpt2 only; None if it has none."""
    tokens: tuple[str, ...]
    """Tokens, one per row of the embedding."""
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """Merge priorities, for llama only: higher scores merge earlier."""
    merges: tuple[str, ...]
    ids: dict[str, int]
    """Token ids of bos, eos, unk and pad if the tokenizer has them, and of eot if answers end with another token."""
    add_bos: bool
    add_eos: bool
    add_space: bool
    """Whether a text is prefixed with a space."""
    chat_template: Templates
    notes: tuple[str, ...]


def read_vocabulary(folder: Path, *, rows: int, config: Mapping[str, Any], ends: tuple[int, ...] = ()) -> Vocabulary:
    """The vocabulary of a folder's tokenizer files, padded to the rows of the embedding.

    ends: tokens that end an answer; the first that is not eos is written as the end of a turn.
    Raises ModelError for a folder without a tokenizer, one that is not BPE, or one with more tokens than rows.
    """
    tokenizer = _loaded(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    core = backend["model"]
    if core["type"] != "BPE":
        raise ModelError(f"{folder} has a {core['type']} tokenizer, and GGUF is written for BPE", try_="no tokenizer")
    bytewise = any(step["type"] == "ByteLevel" for step in flat(backend["pre_tokenizer"], "pretokenizers"))
    _require_pieces(folder, backend, bytewise)
    _drop_rowless_specials(backend, rows)
    tokens, types = _tokens(folder, backend, rows=rows, named={} if bytewise else _pieces(tokenizer))
    merges = _merges(folder, core["merges"])
    pre, notes = pre_of(backend) if bytewise else ("default", ())
    ids = _special_ids(tokenizer, ends)
    add_bos, add_eos = _added(tokenizer, ids)
    add_space, space_notes = (False, ()) if bytewise else _space(tokenizer)
    return Vocabulary(
        model="gpt2" if bytewise else "llama", pre=pre, tokens=tokens, types=types,
        scores=() if bytewise else _scores(tokens, merges), merges=merges, ids=ids, add_bos=add_bos, add_eos=add_eos,
        add_space=add_space, chat_template=templates_of(tokenizer),
        notes=(*notes, *space_notes, *_eos_notes(ids, tokens, config)),
    )  # fmt: skip


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the vocabulary's keys. llama gets merges too: llama.cpp uses the scores, transformers the merges."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_merges(list(vocabulary.merges))
    for what, token in vocabulary.ids.items():
        getattr(writer, f"add_{what}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _loaded(folder: Path) -> Any:
    tokenizer = open_tokenizer(folder, f"{folder} has no tokenizer", try_="the folder of the base model")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{folder} has a {type(tokenizer).__name__}, which is not of the tokenizers library",
            try_="a folder with tokenizer.json",
        )
    return tokenizer


def _require_pieces(folder: Path, backend: dict[str, Any], bytewise: bool) -> None:
    """Require byte pieces, which identify SentencePiece's method; GGUF readers would split others differently."""
    if not bytewise and not backend["model"].get("byte_fallback"):
        raise ModelError(
            f"{folder} has a BPE tokenizer that works neither on bytes nor with SentencePiece's byte tokens",
            try_="no tokenizer",
        )


def _pieces(tokenizer: Any) -> dict[str, int]:
    """Types of SentencePiece's byte tokens and of its unknown token."""
    types = {f"<0x{byte:02X}>": int(_TYPES.BYTE) for byte in range(256)}
    return types | ({tokenizer.unk_token: int(_TYPES.UNKNOWN)} if tokenizer.unk_token else {})


def _tokens(
    folder: Path, backend: dict[str, Any], *, rows: int, named: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and types, one per row; rows without a token are unused. named: types of special tokens."""
    table: dict[int, tuple[str, int]] = {
        place: (token, named.get(token, _TYPES.NORMAL)) for token, place in backend["model"]["vocab"].items()
    }
    for added in backend["added_tokens"]:
        if table.get(added["id"], ("", 0))[1] != _TYPES.UNKNOWN:
            kind = _TYPES.CONTROL if added["special"] else _TYPES.USER_DEFINED
            table[added["id"]] = added["content"], kind
    if table and max(table) >= rows:
        raise ModelError(
            f"{folder} has tokens up to {max(table):,}, and the embedding has {rows:,} rows",
            try_="the tokenizer that was saved with these weights",
        )
    padded = [table.get(row, (f"[PAD{row}]", _TYPES.UNUSED)) for row in range(rows)]
    return tuple(token for token, _ in padded), tuple(int(kind) for _, kind in padded)


def _merges(folder: Path, merges: list[Any]) -> tuple[str, ...]:
    """Pairs joined by a space, in the order in which they are tried."""
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    odd = next((pair for pair in pairs if pair.count(" ") != 1), None)
    if odd is not None:
        raise ModelError(f"{folder} merges {odd!r}, and a GGUF merge is two parts with one space between")
    return tuple(pairs)


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """Negated index of the first merge that produces each token: SentencePiece merges the best score first.

    tokenizer.model has other numbers in the same order: transformers sorts its merges by them.
    """
    places: dict[str, int] = {}
    for merge in merges:
        places.setdefault(merge.replace(" ", "", 1), len(places))
    return tuple(-float(places[token]) if token in places else _NO_SCORE - len(places) for token in tokens)


def _drop_rowless_specials(backend: dict[str, Any], rows: int) -> None:
    """Drop special tokens beyond the embedding, such as a pad that the weights were never resized for."""
    known = backend["model"]["vocab"]
    backend["added_tokens"] = [
        added
        for added in backend["added_tokens"]
        if added["id"] < rows or not added["special"] or added["content"] in known
    ]


def _special_ids(tokenizer: Any, ends: tuple[int, ...]) -> dict[str, int]:
    found = {what: getattr(tokenizer, f"{what}_token_id") for what in ("bos", "eos", "unk", "pad")}
    found["eot"] = next((end for end in ends if end != found["eos"]), None)
    return {what: int(token) for what, token in found.items() if token is not None}


def _added(tokenizer: Any, ids: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos after it, determined by trying."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    longer = len(whole) > len(bare)
    return longer and whole[0] == ids.get("bos"), longer and whole[-1] == ids.get("eos")


def _space(tokenizer: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether a text starts with U+2581, and a note if text after a special token does not; determined by trying.

    llama.cpp has one setting for both (llama-vocab.cpp, `add_space_prefix`).
    """
    text = _spaced(tokenizer, _PROBE, place=0)
    if not text or not tokenizer.eos_token or _spaced(tokenizer, tokenizer.eos_token + _PROBE, place=1):
        return text, ()
    return text, ("behind a special token llama.cpp puts a space that transformers does not: some text within a chat "
                  "becomes other tokens",)  # fmt: skip


def _spaced(tokenizer: Any, text: str, *, place: int) -> bool:
    """Whether the token at an index starts with U+2581."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    return len(pieces) > place and pieces[place].startswith("\u2581")


def templates_of(tokenizer: Any) -> Templates:
    """The chat template or templates of a tokenizer; None if there is none."""
    template = tokenizer.chat_template if tokenizer is not None else None
    if isinstance(template, dict):
        return tuple({"name": name, "template": text} for name, text in template.items())
    return template or None


def _eos_notes(ids: Mapping[str, int], tokens: tuple[str, ...], config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note if the tokenizer's eos is not the model's: answers may never end."""
    said = config.get("eos_token_id")
    ends = said if isinstance(said, list | tuple) else [said]
    own = ids.get("eos")
    if said is None or own in ends:
        return ()
    written = "none" if own is None else f"{tokens[own]} ({own})"
    return (f"eos is {written} as the tokenizer says; the configuration says {', '.join(map(str, ends))}",)
