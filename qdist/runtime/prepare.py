"""Converts, repairs, tokenizes, packs, once, before any process group exists: `python -m qdist.runtime.prepare`."""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from qdist.core.errors import ModelError, QdistError
from qdist.core.facts import from_config
from qdist.core.gptq import Gptq
from qdist.core.plan import DataFacts, Prepared, Source
from qdist.core.pooling import require_packed
from qdist.core.spec import RunSpec
from qdist.host.checkpoints import gptq_of
from qdist.host.files import cache_dir, locked, publish_folder, write_atomic
from qdist.host.fingerprints import fingerprint
from qdist.host.sources import locate
from qdist.runtime.quiet import quiet
from qdist.runtime.tokenized import Summary

if TYPE_CHECKING:
    from qdist.runtime.quantize import Packed


def main() -> None:
    """Read a RunSpec (IN), write a Prepared (OUT); a QdistError goes to OUT.error for the launcher to show."""
    given, wanted = Path(sys.argv[1]), Path(sys.argv[2])
    spec = msgspec.json.decode(given.read_bytes(), type=RunSpec)
    try:
        prepared = prepare(spec)
    except QdistError as error:
        record = {"kind": type(error).__name__, "message": error.message, "try": error.try_}
        write_atomic(wanted.with_suffix(".error"), json.dumps(record))
        raise SystemExit(1) from None
    write_atomic(wanted, msgspec.json.encode(prepared))


def prepare(spec: RunSpec) -> Prepared:
    """The model as a local folder, packed; its tokenizer repaired; the data tokenized. All of it cached."""
    from transformers import AutoConfig

    from qdist.runtime.batches import split
    from qdist.runtime.data import cached_tokenize
    from qdist.runtime.fullest import fullest
    from qdist.runtime.materialize import materialize
    from qdist.runtime.special_tokens import repair
    from qdist.runtime.tokenizer import open_tokenizer

    quiet()
    located = locate(spec.model)
    folder = materialize(located)
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: {str(error).splitlines()[0]}", try_="a folder with config.json and a tokenizer"
        ) from error
    tokenizer = open_tokenizer(folder, f"{spec.model} has no tokenizer to read data with")
    repaired = repair(tokenizer, config, new_tokens=spec.new_tokens)
    tokenized, path = cached_tokenize(
        spec.data,
        tokenizer,
        seq_len=spec.seq_len,
        train_on_source=spec.train.train_on_source,
        folder=cache_dir() / "tokens",
        data_format=None if spec.format == "auto" else spec.format,
    )
    train, held_out = split(len(tokenized), held_out=spec.train.held_out, seed=spec.seed)
    lengths = tokenized.offsets.diff()
    gptq, packed = _packed(spec, folder, config)
    as_it_came = located.kind != "gguf" and (gptq is not None or packed.folder == folder)
    return Prepared(
        source=Source(
            kind="folder",
            path=str(folder),
            packed=str(packed.folder),
            fingerprint=fingerprint(packed.folder) if as_it_came else "",
            gptq=gptq,
            config=config,
            tokenizer=str(_keep_tokenizer(tokenizer)),
            new_token_ids=repaired.new_ids,
            vocab_rows=repaired.rows,
        ),
        data=DataFacts(
            path=str(path),
            samples=len(tokenized),
            train_samples=len(train),
            held_out_samples=len(held_out),
            tokens=int(lengths.sum()),
            longest=int(lengths.max()),
            fullest=fullest(tokenized, train, spec),
        ),
        notes=(*repaired.notes, *filter(None, (packed.note,)), *_data_notes(tokenized.summary, spec)),
    )


def _packed(spec: RunSpec, folder: Path, config: Mapping[str, object]) -> "tuple[Gptq | None, Packed]":
    """Where the ranks read packed weights: the cache, or the GPTQ checkpoint itself, which is looked through first."""
    from qdist.runtime.gptq import check
    from qdist.runtime.gptq.pickled import in_safetensors
    from qdist.runtime.packed_folder import Packing
    from qdist.runtime.quantize import Packed, packed_folder
    from qdist.runtime.quantize_source import blueprint

    gptq = gptq_of(spec, config, folder)
    if gptq is None:
        packing = Packing(bits=spec.bits, type=spec.quant.type, double=spec.quant.double)  # type: ignore[arg-type]
        return None, packed_folder(folder, packing, name=spec.model)
    packed, shape = in_safetensors(folder), blueprint(folder)
    paths = [name.removesuffix(".weight") for name in shape.linears]
    require_packed(spec, gptq, from_config(config, name=spec.model), paths)
    return check.checked(packed, shape, gptq), Packed(packed)


def _keep_tokenizer(tokenizer: Any) -> Path:
    """The repaired tokenizer in a folder of the cache that its contents name."""
    tokenizers = cache_dir() / "tokenizers"
    tokenizers.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tokenizers) as beside:
        tokenizer.save_pretrained(beside)
        files = sorted(path for path in Path(beside).rglob("*") if path.is_file())
        contents = hashlib.sha256()
        for file in files:
            contents.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        folder = tokenizers / contents.hexdigest()[:16]
        with locked(tokenizers / ".lock"):
            if not folder.is_dir():
                staged = tokenizers / f".{folder.name}"
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(beside, staged)
                publish_folder(staged, folder)
    return folder


def _data_notes(summary: Summary, spec: RunSpec) -> tuple[str, ...]:
    notes = []
    if summary.truncated:
        notes.append(f"{summary.truncated:,} of {summary.records:,} records were cut at seq_len={spec.seq_len}")
    if summary.dropped:
        notes.append(
            f"{summary.dropped:,} of {summary.records:,} records were dropped: "
            f"nothing to learn within seq_len={spec.seq_len}"
        )
    return tuple(notes)


if __name__ == "__main__":
    main()
