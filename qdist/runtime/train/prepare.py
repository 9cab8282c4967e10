"""Converts, repairs, tokenizes and packs what a run needs, once, before any process group exists."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.core.data.reading import reading_of
from qdist.core.model.adapters.registry import ADAPTERS
from qdist.core.model.gptq import Gptq
from qdist.core.model.storage import packing_of
from qdist.core.planning.plan import DataFacts, Prepared, Source
from qdist.core.requests import Prepare
from qdist.core.spec.run_spec import RunSpec
from qdist.host.data.chat_templates import find_template
from qdist.host.data.sources import data_notes, digest_over, digests_of, parts_of, sources_of
from qdist.host.files import cache_dir, locked, publish_folder
from qdist.host.sources.model_folder import fingerprint, gptq_of
from qdist.host.sources.models import locate

if TYPE_CHECKING:
    from qdist.runtime.quantize.bitsandbytes import Packed


def run(request: Prepare) -> Prepared:
    """Handle a request to prepare."""
    return prepare(request.spec)


def prepare(spec: RunSpec) -> Prepared:
    """The model as a packed local folder, its tokenizer repaired, the data tokenized; all of it cached."""
    from qdist.runtime.data.chat_template import require_template
    from qdist.runtime.data.fullness import fills, fullest, row_fills
    from qdist.runtime.data.overlap import overlap_note
    from qdist.runtime.data.stream import divide, stream_of
    from qdist.runtime.data.token_cache import cached_tokenize
    from qdist.runtime.data.tokenizer import open_tokenizer, repair, text_settings
    from qdist.runtime.data.tokenizing import sample_rules
    from qdist.runtime.data.wording import give_template, keep_wording, require_worded
    from qdist.runtime.formats.recorded_sums import digest_of_folder
    from qdist.runtime.model.classes import content_of
    from qdist.runtime.model.own_code import needs_code
    from qdist.runtime.model.skeleton import open_config
    from qdist.runtime.quantize.materialize import materialize

    located = locate(spec.model)
    folder = materialize(located, trusted=spec.trust_remote_code)
    config: dict[str, Any] = content_of(open_config(folder))
    tokenizer = open_tokenizer(folder, f"{spec.model} has no tokenizer to read data with")
    repaired = repair(tokenizer, config, new_tokens=spec.new_tokens)
    template = find_template(spec.data.template) if spec.data.template else None
    template_notes = give_template(tokenizer, template) if template else ()
    require_template(tokenizer)
    tokenized, path = cached_tokenize(
        spec.data,
        tokenizer,
        sample_rules(spec, rows=repaired.rows or int(text_settings(config)["vocab_size"])),
        reading=reading_of(spec.data, spec.format),
        seed=spec.seed,
        folder=cache_dir("tokens"),
    )
    summary = tokenized.summary
    if template:
        require_worded(summary.wording, template)
    kept_note = keep_wording(tokenizer, summary.wording) if summary.wording else ""
    digests = digests_of(spec.data)
    parts = parts_of(sources_of(spec.data), (*summary.firsts, len(tokenized)), digests)
    train, held_out = divide(len(tokenized), parts, held_out=spec.train.held_out, seed=spec.seed)
    stream = stream_of(train, parts, seed=spec.seed)
    lengths = tokenized.offsets.diff()
    gptq, packed = _packed(spec, folder, config)
    as_it_came = located.kind != "gguf" and (gptq is not None or packed.folder == folder)
    return Prepared(
        source=Source(
            kind="folder",
            path=str(folder),
            packed=str(packed.folder),
            fingerprint=fingerprint(packed.folder) if as_it_came else "",
            original=fingerprint(folder),
            digest=digest_of_folder(packed.folder),
            gptq=gptq,
            config=config,
            tokenizer=str(_keep_tokenizer(tokenizer)),
            new_token_ids=repaired.new_ids,
            vocab_rows=repaired.rows,
            own_code=str(folder) if needs_code(config) else "",
        ),
        data=DataFacts(
            path=str(path),
            samples=len(tokenized),
            train_samples=len(train),
            held_out_samples=len(held_out),
            tokens=int(lengths.sum()),
            longest=int(lengths.max()),
            attended=float(lengths.double().square().sum() / lengths.sum()),
            records=summary.records,
            wording=summary.wording,
            digest=digest_over(digests),
            parts=parts,
            mixture=stream.epoch if any(part.weight is not None for part in parts) else 0,
            bad=summary.bad,
            fullest=fullest(tokenized, stream, spec),
            fills=(*fills(tokenized, stream, spec), *row_fills(tokenized, stream, spec)),
        ),
        notes=(
            *data_notes(spec.data),
            *repaired.notes,
            *template_notes,
            *filter(None, (packed.note,)),
            *summary.notes,
            *filter(None, (kept_note, overlap_note(tokenized, parts))),
        ),
    )


def _packed(spec: RunSpec, folder: Path, config: Mapping[str, object]) -> "tuple[Gptq | None, Packed]":
    """Where ranks read packed weights: the cache, or the GPTQ checkpoint itself, which is checked first."""
    from qdist.runtime.formats.gptq_folder import in_safetensors
    from qdist.runtime.model.describe import facts_of
    from qdist.runtime.quantize.bitsandbytes import Packed, packed_folder
    from qdist.runtime.quantize.blueprint import blueprint
    from qdist.runtime.quantize.gptq import check

    gptq = gptq_of(spec, config, folder)
    if gptq is None:
        return None, packed_folder(folder, packing_of(spec, config), name=spec.model)
    packed, shape = in_safetensors(folder), blueprint(folder)
    paths = [name.removesuffix(".weight") for name in shape.linears]
    facts = facts_of(config, name=spec.model)
    ADAPTERS[spec.method].require_packed(spec, gptq, facts, paths)
    return check.checked(packed, shape, gptq), Packed(packed)


def _keep_tokenizer(tokenizer: Any) -> Path:
    """Store the repaired tokenizer in a cache folder named by its contents."""
    tokenizers = cache_dir("tokenizers")
    beside = tokenizers / ".new"
    with locked(tokenizers / ".lock"):
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        tokenizer.save_pretrained(beside)
        contents = hashlib.sha256()
        for file in sorted(path for path in beside.rglob("*") if path.is_file()):
            contents.update(str(file.relative_to(beside)).encode() + hashlib.sha256(file.read_bytes()).digest())
        folder = tokenizers / contents.hexdigest()[:16]
        if folder.is_dir():
            shutil.rmtree(beside)
        else:
            publish_folder(beside, folder)
    return folder
