"""What a tokenized data set is, in memory and as a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import safe_open

from qdist.core.conversation import Wording
from qdist.core.errors import DataError
from qdist.core.quoting import quoted
from qdist.host.files import replacing, sync
from qdist.host.opening import require_file, told
from qdist.runtime.packed_folder import entries_of, write_safetensors
from qdist.runtime.sealed import is_intact, sealed

IGNORED = -100
"""The label of a token without loss, as transformers and torch have it."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the records."""

    records: int
    dropped: int
    """Nothing to learn was in them, or left of them after truncation; not in the set."""
    truncated: int
    """Cut at seq_len, dropped ones included."""
    tokens: int
    learned_tokens: int
    wording: Wording | None = None
    """None for random tokens."""
    notes: tuple[str, ...] = ()
    """What was dropped, cut or written otherwise, for the user."""


class TokenizedSet(NamedTuple):
    """Samples laid end to end; sample i is `offsets[i]:offsets[i + 1]`.

    tokens, labels: int32 [tokens]. A label is aligned with its token, as transformers has it: the loss of position
    p - 1 is taken against label p, so the first label of a sample never counts.
    offsets: int64 [samples + 1].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    summary: Summary

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def span(self, index: int) -> slice:
        """Where sample `index` lies in `tokens` and `labels`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def learned_tokens(tokenized: TokenizedSet, indices: Iterable[int]) -> int:
    """How many tokens of these samples have a loss: the first of a sample has nothing before it to predict it."""
    spans = (tokenized.span(index) for index in indices)
    return sum(int((tokenized.labels[span.start + 1 : span.stop] != IGNORED).sum()) for span in spans)


def save(tokenized: TokenizedSet, path: Path, *, key: str) -> None:
    """Write the set beside `path` and rename it there, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": tokenized.tokens, "labels": tokenized.labels, "offsets": tokenized.offsets}
    summary = msgspec.json.encode(tokenized.summary).decode()
    metadata = sealed(arrays, {"key": key, "summary": summary})
    with replacing(path) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
        write_safetensors(file, entries_of(arrays), metadata=metadata)
    sync(path.parent)


def load(path: Path, *, key: str) -> TokenizedSet:
    """Map the set at `path` into memory; it is summed, and then read again as it is used.

    Raises DataError when the file is damaged or was written for another key.
    """
    gone = quoted("rm", path)
    require_file(path, DataError, try_=gone)
    with told(f"{path} is damaged", DataError, try_=gone), safe_open(path, framework="pt", device="cpu") as stored:
        found = stored.metadata() or {}
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (a handle is no dict)
        if not is_intact(arrays, found):
            raise DataError(f"{path} is damaged: it does not hold the tokens that were written", try_=gone)
        if found.get("key") != key:
            raise DataError(f"{path} holds key {found.get('key')}, not {key}", try_=gone)
        summary = msgspec.json.decode(found["summary"], type=Summary)
    return TokenizedSet(arrays["tokens"], arrays["labels"], arrays["offsets"], summary)
