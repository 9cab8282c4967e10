"""What llama.cpp calls a way of cutting text into words, found out from the tokenizer's own rules.

llama.cpp has the rules in its code, under names (llama-vocab.cpp); a file says a name. Its converter finds the name by
a checksum of an encoded text, which only knows vocabularies that somebody registered. The rules themselves are in
tokenizer.json, so they are compared here: a vocabulary that was extended or trained anew is recognized too.
"""

import json
from typing import Any, NamedTuple

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
    """How text is cut, and whether a word that is a token is taken whole, before any merge."""

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
    """The steps of a sequence, of sequences of them, or of one alone."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in flat(part, key)]
    return [step]


def _step(step: dict[str, Any]) -> str:
    """A step in the words of `_NAMES`; what is not among them, as JSON."""
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
