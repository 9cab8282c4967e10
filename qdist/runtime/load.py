"""Opens a run or a model for use: `model, tokenizer = qdist.load(RUN_OR_MODEL)`."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.errors import MachineError, ModelError, RunError, SpecError
from qdist.core.packing import packing_of
from qdist.core.plan import Plan, Source
from qdist.core.quoting import command
from qdist.core.residence import Footprint, Residence, footprint
from qdist.core.units import parse_bytes
from qdist.host.adapters import step_note
from qdist.host.fingerprints import require_same_original, require_same_tensors
from qdist.host.opening import require_files, told
from qdist.host.rundir import RunDir
from qdist.host.sources import locate
from qdist.host.terminal import say
from qdist.runtime.gptq.pickled import in_safetensors
from qdist.runtime.methods.backbone import DTYPES, load_backbone
from qdist.runtime.placements.residence import arrange, choose, first_device, settle
from qdist.runtime.quantize import packed_folder
from qdist.runtime.recorded_sums import digest_of_folder
from qdist.runtime.sealed import require_adapter
from qdist.runtime.tokenizer import open_tokenizer

TOKENIZER = "tokenizer"
"""In a run: its tokenizer, as the cache had it when the run began."""
ROOM_TOKENS = 2048
"""Tokens of all sequences together for whose keys and values room is left, where nobody says how many."""


class Opened(NamedTuple):
    """A model ready to generate."""

    model: Any
    tokenizer: Any
    """None where there is none."""
    where: str
    """On which GPUs it lies, as a line for people."""


def load(
    run_or_model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_memory: str | int | None = None,
) -> tuple[Any, Any]:
    """A transformers model ready to generate, and its tokenizer, or None where there is none.

    A backbone goes to the first GPU with room for it, its adapter and 2,048 tokens; else its layers are spread over
    the GPUs; else as many as need be wait in host memory. Without a GPU it goes to the CPU.

    run_or_model: a run directory (its quantized backbone with its adapter on), or any model that `qdist launch`
    takes: an alias, a folder, a GGUF file, a hub id.
    dtype: auto, bfloat16, float16 or float32. auto is what the run computed in, or what the model is stored in.
    device: such as cuda:0 or cpu, for all of it.
    max_memory: such as '20GiB': what to put on each GPU at most, 2,048 tokens included.

    Raises RunError for a run without an adapter, ModelError for a model that cannot be found, PlanError for one that
    fits nowhere.
    """
    cap = None if max_memory is None else parse_bytes(max_memory)
    opened = open_model(run_or_model, dtype=dtype, device=device, max_memory_bytes=cap)
    run = RunDir(run_or_model)
    if run.exists() and (note := step_note(run)):
        say(f"note: {run.path}: {note}", err=True)
    return opened.model, opened.tokenizer


def open_model(
    run_or_model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_memory_bytes: int | None = None,
    tokens: int = ROOM_TOKENS,
    needs_tokenizer: bool = False,
) -> Opened:
    """As `load`.

    tokens: of all sequences together, prompts and answers, for which there is to be room.
    needs_tokenizer: refuse a model without one, before its weights are read.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise SpecError(f"dtype cannot be {dtype!r}", try_="auto, bfloat16, float16 or float32")
    run = RunDir(run_or_model)
    if not run.exists():
        from qdist.runtime.load_plain import open_plain

        name = str(run_or_model)
        return Opened(*open_plain(name, dtype, device, max_memory_bytes, needs_tokenizer=needs_tokenizer))
    plan = answering_plan(run, needs_tokenizer=needs_tokenizer)
    chosen = DTYPES[plan.compute_dtype if dtype == "auto" else dtype]
    residence = residence_of(plan, chosen, device=device, max_memory_bytes=max_memory_bytes, tokens=tokens)
    model, tokenizer = load_run(run, chosen, residence)
    return Opened(model, tokenizer, str(residence))


def answering_plan(run: RunDir, *, needs_tokenizer: bool) -> Plan:
    """The plan of a run that has an adapter, and a tokenizer where one is needed."""
    if not run.adapter.is_dir():
        raise RunError(f"{run.path} has no adapter yet", try_=command("gather", run.path))
    plan = plan_of(run)
    if needs_tokenizer and not plan.source.tokenizer:
        raise RunError(
            f"{run.path} was trained on random weights and has no tokenizer to read prompts with",
            try_="a run without --load-format dummy",
        )
    return plan


def plan_of(run: RunDir) -> Plan:
    """The run's plan. Its tokenizer is the run's own copy where the cache was emptied since, or the adapter's."""
    plan = run.plan()
    if plan.source.tokenizer and not Path(plan.source.tokenizer).is_dir():
        kept = run.path / TOKENIZER
        source = msgspec.structs.replace(plan.source, tokenizer=str(kept if kept.is_dir() else run.adapter))
        return msgspec.structs.replace(plan, source=source)
    return plan


def residence_of(
    plan: Plan,
    dtype: torch.dtype,
    *,
    tokens: int,
    scored: int = 0,
    device: str | None = None,
    max_memory_bytes: int | None = None,
) -> Residence:
    """Where a run's backbone and adapter go on this machine; see `footprint` and `choose`."""
    parts = footprint_of(plan, dtype, tokens=tokens, scored=scored)
    return choose(parts, device=device, max_memory_bytes=max_memory_bytes)


def footprint_of(plan: Plan, dtype: torch.dtype, *, tokens: int, scored: int = 0) -> Footprint:
    """What a run's backbone and adapter take in use; see `footprint`."""
    spec = plan.spec
    return footprint(
        plan.facts,
        bits=spec.bits,
        double_quant=spec.quant.double,
        gptq=plan.source.gptq,
        compute_bytes=dtype.itemsize,
        tokens=tokens,
        rank_r=spec.lora.r,
        targets=spec.lora.targets,
        pool=plan.pool,
        scored=scored,
    )


def load_run(run: RunDir, dtype: torch.dtype, residence: Residence) -> tuple[Any, Any]:
    """A run's backbone with its adapter on, where it is to lie, and the run's tokenizer."""
    from peft import PeftConfig, PeftModel

    from qdist.runtime.methods.fused_lora import FusedLora
    from qdist.runtime.special_tokens import align_config

    require_adapter(run.adapter)
    plan = plan_of(run)
    backbone = load_backbone(
        with_packed(plan),
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=dtype,
        device=first_device(residence),
        linear_names=plan.facts.linear_names,
        arrange=partial(arrange, residence=residence),
    )
    again = command("gather", run.path)
    require_files(run.adapter, RunError, try_=again)
    with told(f"{run.adapter} cannot be read", RunError, try_=again):
        config = PeftConfig.from_pretrained(str(run.adapter))
    config._register_custom_module({nn.Linear: FusedLora})
    # The file is read into host memory: PEFT's own choice is all of it on GPU 0, beside the matrices that it fills.
    with told(f"{run.adapter} cannot be read", RunError, try_=again):
        model = PeftModel.from_pretrained(backbone, str(run.adapter), config=config, torch_device="cpu")
    model.eval()
    settle(model, residence)
    tokenizer = load_tokenizer(plan.source)
    if tokenizer is not None:
        align_config(model, tokenizer, plan.ends)
    model.config.use_cache = True
    return model, tokenizer


def load_tokenizer(source: Source) -> Any:
    """The repaired tokenizer of a run, or None for random weights."""
    if not source.tokenizer:
        return None
    return open_tokenizer(
        Path(source.tokenizer), f"{source.tokenizer} has no tokenizer", try_="the run's adapter folder"
    )


def with_packed(plan: Plan) -> Source:
    """A run's source with packed weights that are there: packed again where the cache was emptied since.

    Raises ModelError where they are gone, RunError where others are in their place.
    """
    source, spec = plan.source, plan.spec
    if source.kind == "dummy":
        return source
    if source.packed and Path(source.packed).is_dir():
        require_same_tensors(source, source.packed, run="the run")
        return source
    source = with_model(plan)
    require_same_original(source, run="the run")
    if source.gptq:
        packed = in_safetensors(Path(source.path))
    else:
        packed = packed_folder(Path(source.path), packing_of(spec), name=spec.model).folder
    digest = digest_of_folder(packed)
    if source.digest not in ("", digest):
        say(
            f"warning: {source.path} was packed to other bytes than those that the run was trained on: by other "
            "versions, or on another device",
            err=True,
        )
    return msgspec.structs.replace(source, packed=str(packed), digest=digest)


def with_model(plan: Plan) -> Source:
    """A run's source with the model that is there: converted or fetched again where the cache was emptied since.

    Raises ModelError where it is gone.
    """
    source = plan.source
    if Path(source.path).is_dir():
        return source
    from qdist.runtime.materialize import materialize

    try:
        found = materialize(locate(plan.spec.model))
    except (ModelError, MachineError) as error:
        raise ModelError(
            f"{source.path}, which the run was trained on, is gone, and so is what was packed from it: {error.message}",
            try_="put the model back where it was",
        ) from error
    return msgspec.structs.replace(source, path=str(found))
