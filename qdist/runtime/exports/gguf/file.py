"""Writes a GGUF file, for llama.cpp and programs based on it, holding one tensor in memory at a time.

The file is whole or absent: it grows beside, as `.NAME.unfinished`, and is renamed once it is on disk.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from qdist.core.errors import ModelError
from qdist.host.files import sync
from qdist.host.progress import ProgressLine
from qdist.runtime.exports.gguf.blocks import Affine, Kind, Make, Stored, encoded, made, rows_of
from qdist.runtime.exports.gguf.metadata import add_metadata, gguf_of, model_notes, rope_of
from qdist.runtime.exports.gguf.tensors import facts_of, stored_tensors
from qdist.runtime.exports.gguf.tokenizer import Templates, Vocabulary, add_vocabulary, read_vocabulary

__all__ = ["Affine", "Kind", "Make", "Report", "file_bytes", "write_gguf"]
_NO_VOCABULARY = "the file has no vocabulary: llama.cpp computes with token ids alone"


class Report(NamedTuple):
    """A finished file."""

    path: Path
    bytes: int
    tensors: dict[str, int]
    """Number of tensors of each type, such as Q4_1."""
    pre: str | None
    """llama.cpp's name for the pre-tokenizer, or None if it falls back or has no text at all."""
    notes: tuple[str, ...]
    """Notes for the user on where readers differ from transformers."""


def write_gguf(
    out: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Make]],
    *,
    config: Mapping[str, Any],
    tokenizer: Path | None,
    name: str,
    kind: Kind,
    ends: tuple[int, ...] = (),
    chat_template: Templates = None,
) -> Report:
    """Write a model of a family that has GGUF names to `out`, replacing an existing file.

    tensors: the whole model under transformers' names, each with its shape and what makes it when its turn comes.
        For q4_1, every linear of a decoder layer must be made as `Affine`; elsewhere an `Affine` becomes its weights.
    config: the content of config.json. Its `tie_word_embeddings` decides whether there is an output head.
    tokenizer: a folder with transformers' tokenizer files; None leaves the file without a vocabulary.
    name: general.name.
    ends: tokens that end an answer, beside the tokenizer's eos.
    chat_template: what the file has in place of the tokenizer's own; None keeps that.
    kind: f16: matrices are F16. q8_0: matrices whose rows are multiples of 32 are Q8_0, others F16. q4_1: linears are
        Q4_1, bit for bit but for minimums rounded to fp16, embedding and head F16. Others: see `quantizer.MIXTURES`.
        Vectors are F32 in all of them.

    Raises ModelError before anything is written for what the format cannot say, and, while writing, for numbers that
    fp16 cannot hold or a tensor that is not what `tensors` announces; then nothing is left of the new file.
    """
    facts, rope = facts_of(config, name=name), rope_of(config, name=name)
    stored = stored_tensors(tensors, facts, rope, kind)
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer, rows=facts.vocab, config=config, ends=ends)
    beside = out.with_name(f".{out.name}.unfinished")
    writer = gguf.GGUFWriter(beside, gguf_of(facts).architecture)
    add_metadata(writer, facts, rope, config, kind)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        add_vocabulary(writer, vocabulary._replace(chat_template=chat_template or vocabulary.chat_template))
    for tensor in stored:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    _publish(writer, stored, beside, out)
    notes = model_notes(facts, config) + ((_NO_VOCABULARY,) if vocabulary is None else vocabulary.notes)
    return Report(out, out.stat().st_size, _counts(stored), _pre(vocabulary), notes)


def file_bytes(
    tensors: Mapping[str, tuple[tuple[int, ...], Make]], *, config: Mapping[str, Any], name: str, kind: Kind
) -> int:
    """Bytes of all tensors in the file that `write_gguf` would write; its vocabulary takes a few MB more."""
    facts, rope = facts_of(config, name=name), rope_of(config, name=name)
    return sum(tensor.bytes for tensor in stored_tensors(tensors, facts, rope, kind))


def _publish(writer: Any, stored: tuple[Stored, ...], beside: Path, out: Path) -> None:
    """Write everything to a temporary file, flush it, and rename it into place."""
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            with ProgressLine(sum(tensor.bytes for tensor in stored), "written", in_bytes=True) as progress:
                for tensor in stored:
                    _write_tensor(writer, file, tensor)
                    progress.advance(tensor.bytes)
        finally:
            writer.close()
        sync(beside)
        os.replace(beside, out)
        sync(out.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _write_tensor(writer: Any, file: Any, tensor: Stored) -> None:
    """Write a tensor a few rows at a time: GGUFWriter's `write_tensor_data` would need a second copy of all of it."""
    value, start = made(tensor), file.tell()
    for rows in rows_of(tensor, value):
        file.write(encoded(tensor, rows.part).tobytes())
    if file.tell() - start != tensor.bytes:
        raise ModelError(f"{tensor.source} became {file.tell() - start:,} bytes, not {tensor.bytes:,}")
    writer.write_padding(file, tensor.bytes)


def _counts(stored: tuple[Stored, ...]) -> dict[str, int]:
    names = [str(tensor.type.name) for tensor in stored]
    return {name: names.count(name) for name in sorted(set(names))}


def _pre(vocabulary: Vocabulary | None) -> str | None:
    return None if vocabulary is None else vocabulary.pre
