"""Converts, repairs, tokenizes and packs what a run needs, once, before any process group exists."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qdist.core.data.conversation import Wording
from qdist.core.data.reading import reading_of
from qdist.core.data.templates import NamedTemplate
from qdist.core.evaluation.windows import longest_scored
from qdist.core.model.adapters.registry import ADAPTERS
from qdist.core.model.gptq import Gptq
from qdist.core.model.storage import packing_of
from qdist.core.planning.plan import DataFacts, Prepared, Source
from qdist.core.requests import Prepare, PrepareModel
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


def run_model(request: PrepareModel) -> Prepared:
    """Handle a request to prepare a model alone."""
    made = opened_model(request.spec)
    source, note = _source_of(request.spec, made)
    return Prepared(source=source, data=None, notes=(*made.notes, *filter(None, (note,))))


def prepare(spec: RunSpec) -> Prepared:
    """The model as a packed local folder, its tokenizer repaired, the data tokenized; all of it cached."""
    from qdist.runtime.data.chat_template import require_template
    from qdist.runtime.data.fullness import fills, fullest, row_fills
    from qdist.runtime.data.overlap import overlap_note
    from qdist.runtime.data.stream import divide, stream_of
    from qdist.runtime.data.token_cache import cached_tokenize
    from qdist.runtime.data.tokenizer import text_settings
    from qdist.runtime.data.tokenizing import sample_rules
    from qdist.runtime.data.wording import keep_wording, require_worded

    made = opened_model(spec)
    require_template(made.tokenizer)
    tokenized, path = cached_tokenize(
        spec.data,
        made.tokenizer,
        sample_rules(spec, rows=made.rows or int(text_settings(made.config)["vocab_size"])),
        reading=reading_of(spec.data, spec.format),
        seed=spec.seed,
        folder=cache_dir("tokens"),
    )
    summary = tokenized.summary
    if made.template:
        require_worded(summary.wording, made.template)
    kept_note = keep_wording(made.tokenizer, summary.wording) if summary.wording else ""
    digests = digests_of(spec.data)
    parts = parts_of(sources_of(spec.data), (*summary.firsts, len(tokenized)), digests)
    train, held_out = divide(len(tokenized), parts, held_out=spec.train.held_out, seed=spec.seed)
    stream = stream_of(train, parts, seed=spec.seed)
    lengths = tokenized.offsets.diff()
    costs = _tasks(spec, made, summary.wording)
    source, packed_note = _source_of(spec, made)
    return Prepared(
        source=source,
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
            *made.notes,
            *filter(None, (packed_note,)),
            *summary.notes,
            *filter(None, (kept_note, overlap_note(tokenized, parts))),
            *costs,
        ),
    )


def _tasks(spec: RunSpec, made: "OpenedModel", wording: Wording | None) -> list[str]:
    """What evaluations will compute for `train.tasks`; their files are read here first, before ranks need them."""
    if not spec.train.tasks:
        return []
    from qdist.runtime.model.describe import facts_of
    from qdist.runtime.train.tasks import cost_notes, open_tasks

    longest = longest_scored(spec.seq_len, facts_of(made.config, name=spec.model).max_positions)
    return cost_notes(spec, open_tasks(spec, made.tokenizer, wording, longest=longest), steps=spec.steps)


class OpenedModel(NamedTuple):
    """A model's folder with its tokenizer repaired."""

    folder: Path
    as_it_came: bool
    """Whether the folder is the user's own, or the hub's: nothing was converted."""
    config: dict[str, Any]
    tokenizer: Any
    new_ids: tuple[int, ...]
    rows: int | None
    template: NamedTemplate | None
    """The chat template that was asked for."""
    notes: tuple[str, ...]


def opened_model(spec: RunSpec) -> OpenedModel:
    """A spec's model, fetched and converted if need be. Raises ModelError for what cannot be opened."""
    from qdist.runtime.data.tokenizer import open_tokenizer, repair
    from qdist.runtime.data.wording import give_template
    from qdist.runtime.model.classes import content_of
    from qdist.runtime.model.skeleton import open_config
    from qdist.runtime.quantize.materialize import materialize

    located = locate(spec.model)
    folder = materialize(located, trusted=spec.trust_remote_code)
    config: dict[str, Any] = content_of(open_config(folder))
    tokenizer = open_tokenizer(folder, f"{spec.model} has no tokenizer to read data with")
    repaired = repair(tokenizer, config, new_tokens=spec.new_tokens)
    template = find_template(spec.data.template) if spec.data.template else None
    template_notes = give_template(tokenizer, template) if template else ()
    return OpenedModel(
        folder=folder,
        as_it_came=located.kind != "gguf",
        config=config,
        tokenizer=tokenizer,
        new_ids=repaired.new_ids,
        rows=repaired.rows,
        template=template,
        notes=(*repaired.notes, *template_notes),
    )


def _source_of(spec: RunSpec, made: OpenedModel) -> tuple[Source, str]:
    """The packed model, with the tokenizer as it is now kept; and a note, or none, on what was packed."""
    from qdist.runtime.formats.recorded_sums import digest_of_folder
    from qdist.runtime.model.own_code import needs_code

    folder, config = made.folder, made.config
    gptq, packed = _packed(spec, folder, config)
    as_it_came = made.as_it_came and (gptq is not None or packed.folder == folder)
    source = Source(
        kind="folder",
        path=str(folder),
        packed=str(packed.folder),
        fingerprint=fingerprint(packed.folder) if as_it_came else "",
        original=fingerprint(folder),
        digest=digest_of_folder(packed.folder),
        gptq=gptq,
        config=config,
        tokenizer=str(_keep_tokenizer(made.tokenizer)),
        new_token_ids=made.new_ids,
        vocab_rows=made.rows,
        own_code=str(folder) if needs_code(config) else "",
    )
    return source, packed.note


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
