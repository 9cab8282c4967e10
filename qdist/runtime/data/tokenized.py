"""A tokenized data set, in memory and as a file that later runs with the same contents memory-map."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import safe_open

from qdist.core.data.conversation import Wording
from qdist.core.errors import DataError
from qdist.core.text import quoted
from qdist.host.files import replacing, sync
from qdist.host.opening import require_file, told
from qdist.runtime.formats.streamed import Stream, is_file_intact, stream_of, write_streams

IGNORED = -100
"""Label of tokens without a loss, as in transformers and torch."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of tokenizing the records."""

    records: int
    dropped: int
    """Records left out because they have nothing to learn, before or after truncation."""
    truncated: int
    """Records cut at seq_len, including dropped ones."""
    tokens: int
    learned_tokens: int
    whole: int | None = None
    """Records of which every token is learned; None in sets of an older qdist, which did not count them."""
    wording: Wording | None = None
    """None for random tokens."""
    notes: tuple[str, ...] = ()
    """What was dropped, cut or written differently, for the user."""
    firsts: tuple[int, ...] = (0,)
    """Index of the first sample of each source."""
    bad: int = 0
    """Records that could not be used and were left out."""


class TokenizedSet(NamedTuple):
    """Concatenated samples; sample i is `offsets[i]:offsets[i + 1]`.

    tokens, labels: int32 [tokens]. A label is aligned with its token, as transformers has it: the loss of position
    p - 1 is taken against label p, so the first label of a sample never counts.
    offsets: int64 [samples + 1].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    summary: Summary
    learned: torch.Tensor | None = None
    """int32 [samples]: how many tokens of each have a loss; None in sets of an older qdist."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def span(self, index: int) -> slice:
        """Range of sample `index` in `tokens` and `labels`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def learned_tokens(tokenized: TokenizedSet, indices: Iterable[int]) -> int:
    """Number of tokens of these samples that have a loss: a sample's first token has nothing to predict it."""
    if tokenized.learned is not None:
        return int(tokenized.learned[list(indices)].sum())
    spans = (tokenized.span(index) for index in indices)
    return sum(int((tokenized.labels[span.start + 1 : span.stop] != IGNORED).sum()) for span in spans)


def learned_of_each(tokenized: TokenizedSet) -> torch.Tensor:
    """Number of tokens with a loss in each sample, int32 or int64 [samples]."""
    if tokenized.learned is not None:
        return tokenized.learned
    counts = (tokenized.labels != IGNORED).to(torch.int64)
    counts[tokenized.offsets[:-1]] = 0
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return before[tokenized.offsets[1:]] - before[tokenized.offsets[:-1]]


def save(tokenized: TokenizedSet, path: Path, *, key: str) -> None:
    """Write the set to a temporary file and rename it to `path`, so that no reader sees a partial one."""
    arrays = {"tokens": tokenized.tokens, "labels": tokenized.labels, "offsets": tokenized.offsets}
    if tokenized.learned is not None:
        arrays["learned"] = tokenized.learned
    summary = msgspec.json.encode(tokenized.summary).decode()
    publish(path, {name: stream_of(own) for name, own in arrays.items()}, {"key": key, "summary": summary})


def publish(path: Path, streams: Mapping[str, Stream], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors beside `path`, a part at a time, and rename it to that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
        write_streams(file, streams, metadata)
    sync(path.parent)


def load(path: Path, *, key: str) -> TokenizedSet:
    """Memory-map the set at `path`; it is read once for its checksum, and again as it is used.

    Raises DataError when the file is damaged or was written for another key.
    """
    gone = quoted("rm", path)
    metadata, arrays = read_arrays(path, try_=gone)
    if metadata.get("key") != key:
        raise DataError(f"{path} holds key {metadata.get('key')}, not {key}", try_=gone)
    with told(f"{path} is damaged", DataError, try_=gone):
        summary = msgspec.json.decode(metadata["summary"], type=Summary)
    return TokenizedSet(arrays["tokens"], arrays["labels"], arrays["offsets"], summary, arrays.get("learned"))


def read_arrays(path: Path, *, try_: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata of a file, and its tensors, memory-mapped. Raises DataError if it is damaged."""
    require_file(path, DataError, try_=try_)
    with told(f"{path} is damaged", DataError, try_=try_), safe_open(path, framework="pt", device="cpu") as stored:
        metadata = stored.metadata() or {}
        if not is_file_intact(path, metadata):
            raise DataError(f"{path} is damaged: it does not hold the tokens that were written", try_=try_)
        return metadata, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (a handle is not a dict)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file, which is not read any further."""
    with told(f"{path} is damaged", DataError, try_=quoted("rm", path)), safe_open(path, framework="pt") as stored:
        return stored.metadata() or {}
