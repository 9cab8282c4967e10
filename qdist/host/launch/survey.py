"""What a launch needs, what of it exists, and what would be downloaded, converted or tokenized; writes nothing."""

import os
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qdist.core.data.reading import reading_of
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import ModelFacts
from qdist.core.model.storage import packing_of
from qdist.core.planning.disk import packed_bytes
from qdist.core.planning.plan import DataFacts, Prepared, Source, held_out_of, mixture_of
from qdist.core.spec.run_spec import RunSpec
from qdist.host import files
from qdist.host.data.records import is_local as is_local_source
from qdist.host.data.sources import count_records, is_local, parts_of, sources_of
from qdist.host.files import cache_path
from qdist.host.sources import cache as cached
from qdist.host.sources.facts import facts_of, shape_note
from qdist.host.sources.model_folder import gptq_of, safetensors_of
from qdist.host.sources.models import Located, Shape, code_of, find_shape, read_json
from qdist.host.sources.targets import check_model

Action = Literal["fetch", "convert", "pack", "tokenize"]


class Work(NamedTuple):
    """A preparation step that a launch does once, before any rank starts, unless its result exists."""

    action: Action
    what: str
    """What is downloaded, converted and so on, by the user's name for it."""
    into: str
    """The resulting form, such as 'a bfloat16 folder' or 'nf4'; empty if there is nothing to say."""
    folder: Path
    """Where the result goes."""
    size_bytes: int | None
    """Bytes of the result, as far as shapes tell; None if only the hub knows."""
    there: Path | None = None
    """Where the result is, if it exists already."""


class Survey(NamedTuple):
    """What is known of a model without torch or a hub."""

    folder: Path | None
    """The folder that transformers opens; None if it has to be created or downloaded."""
    work: tuple[Work, ...]
    source: Source | None = None
    """Source to plan with; None if only a hub or the weights could tell its shape."""
    facts: ModelFacts | None = None
    """Model facts; None if `source` is."""
    note: str = ""
    """Where the shape is from, if not from the model itself."""


def survey(spec: RunSpec) -> Survey:
    """Look for a run's model, and for what earlier launches made from it.

    Raises ModelError for a model that is not there or cannot be opened, SpecError where method and model do not go
    together.
    """
    folder, work = _folder_of(check_model(spec.model, trusted=spec.trust_remote_code))
    known = _shape(spec, folder)
    if known is None:
        return Survey(folder, tuple(work))
    config, facts, note, code = known
    gptq = gptq_of(spec, config, folder)
    work = [each._replace(size_bytes=2 * facts.parameters) for each in work]  # in 16 bits
    packing = _packing_work(spec, folder, config, facts, gptq)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=gptq, own_code=code)
    return Survey(folder, (*work, *packing), source, facts, note)


def require_room(spec: RunSpec, work: tuple[Work, ...]) -> None:
    """Raise PlanError if a disk has no room for what would be downloaded, converted and packed."""
    verbs = {"fetch": "fetching", "convert": "converting", "pack": "packing"}
    by_disk: dict[int, list[Work]] = defaultdict(list)
    for each in work:
        if each.there is None and each.size_bytes:
            by_disk[os.stat(files.nearest(each.folder)).st_dev].append(each)
    for several in by_disk.values():
        cache = any(each.folder.is_relative_to(cache_path()) for each in several)
        files.require_space(
            cache_path() if cache else several[0].folder,
            sum(each.size_bytes or 0 for each in several),
            purpose=f"{' and '.join(verbs[each.action] for each in several)} {spec.model}",
            try_=f"{'QDIST_CACHE' if cache else 'HF_HOME'}=FOLDER, on a disk with room",
        )


def counted(spec: RunSpec) -> tuple[int, ...] | None:
    """Number of usable records of each source of a run; None if one is on a hub. Raises DataError for bad ones."""
    if not is_local(spec.data):
        return None
    return count_records(spec.data, reading_of(spec.data, spec.format), seed=spec.seed)


def expected(spec: RunSpec, facts: ModelFacts, records: tuple[int, ...]) -> DataFacts:
    """The data if every record were a sample of maximal length: what to plan with until they are tokenized.

    records: of each source, as `counted` gives them.
    """
    longest, samples = min(spec.seq_len, facts.max_positions), sum(records)
    parts = parts_of(sources_of(spec.data), (0, *accumulate(records)))
    held_out = sum(part.samples for part in parts if part.held_out) or held_out_of(samples, spec.train.held_out)
    share = 1.0 if spec.data.eval else (samples - held_out) / max(1, samples)
    return DataFacts(
        path="",
        samples=samples,
        train_samples=samples - held_out,
        held_out_samples=held_out,
        tokens=samples * longest,
        longest=longest,
        parts=parts,
        mixture=mixture_of(parts, [round(part.samples * share) for part in parts if not part.held_out]),
    )


def tokenizing(spec: RunSpec, records: tuple[int, ...] | None, before: Prepared | None) -> tuple[Work, ...]:
    """The remaining work on the data. before: what an earlier launch prepared from the same data."""
    there = Path(before.data.path) if before and before.data else None
    size = there.stat().st_size if there else None
    sources = sources_of(spec.data)
    names = ", ".join(str(source.part) for source in sources)
    what = names + (f" ({sum(records):,} records)" if records is not None else "")
    tokenize = Work("tokenize", what, "", cache_path() / "tokens", size, there)
    fetched = () if there else tuple(source.name for source in sources if not is_local_source(source.name))
    return (*(Work("fetch", name, "", Path(), None) for name in fetched), tokenize)


def _folder_of(located: Located) -> tuple[Path | None, list[Work]]:
    """The model's folder, if it exists, and the work that creates one; sizes are still unknown."""
    if located.kind == "folder":
        return Path(located.path), []
    if located.kind == "hub":
        fetched, hub = _fetched(located.path)
        return fetched, [Work("fetch", located.path, "", hub, None, fetched)]
    file = Path(located.path)
    folder = cached.known_converted_folder(file)
    there = folder if folder and folder.is_dir() else None
    return there, [Work("convert", file.name, "a bfloat16 folder", cache_path() / "models", None, there)]


def _fetched(hub_id: str) -> tuple[Path | None, Path]:
    """Where the hub's cache has the complete model, or None; and where that cache is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    hub = Path(HF_HUB_CACHE)
    if not (hub / f"models--{hub_id.replace('/', '--')}").is_dir():
        return None, hub  # which saves a third of a second for most
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", cache_dir=hub)
    if not isinstance(config, str):
        return None, hub
    folder = Path(config).parent
    names = safetensors_of(folder)
    whole = all((folder / name).is_file() for name in names) if names else any(folder.glob("*.bin"))
    return (folder if whole else None), hub


def _shape(spec: RunSpec, folder: Path | None) -> Shape | None:
    """The shape as `find_shape` has it, read from converted or downloaded files if they exist."""
    if folder is None:
        return find_shape(spec.model, trusted=spec.trust_remote_code)
    config = read_json(folder / "config.json")
    found = Located(kind="folder", path=str(folder), config=config)
    code = code_of(found, config) if spec.trust_remote_code else ""
    return Shape(config, facts_of(config, name=spec.model, code=code), shape_note(config), code)


def _packing_work(
    spec: RunSpec, folder: Path | None, config: Mapping[str, Any], facts: ModelFacts, gptq: Gptq | None
) -> list[Work]:
    """The work of packing the weights that the ranks read in place of the original ones."""
    if gptq is not None:
        pickled = [] if folder is None or safetensors_of(folder) else list(folder.glob("*.bin"))
        size = sum(file.stat().st_size for file in pickled)
        return [Work("convert", spec.model, "safetensors", cache_path() / "gptq", size)] if pickled else []
    as_it_is = spec.bits == 16 and (folder is None or bool(safetensors_of(folder)))
    if config.get("quantization_config") or as_it_is:
        return []
    packing = packing_of(spec, config)
    stored = 4 if folder is not None and (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    into = f"{packing.bits} bits {packing}" if packing.bits < 16 else "a 16-bit folder"
    size = packed_bytes(facts, packing, stored_bytes=stored)
    there = None
    if folder is not None:
        out = cached.packed_folder(folder, packing, name=spec.model)
        there = out if out.is_dir() else None
        half = cached.work_folder(out)
        size = max(0, size - sum(file.stat().st_size for file in half.glob("*.safetensors")))
    return [Work("pack", spec.model, into, cache_path() / "packed", size, there)]
