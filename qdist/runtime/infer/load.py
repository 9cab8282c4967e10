"""Opens a run or a model for use: `model, tokenizer = qdist.load(RUN_OR_MODEL)`."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.errors import MachineError, ModelError, RunError, SpecError
from qdist.core.model.storage import packing_of
from qdist.core.planning.answering import Questions, answering_footprint
from qdist.core.planning.inference import Footprint, Residence, count_in_use, room
from qdist.core.planning.memory import Sizes, TrainingShape, sizes
from qdist.core.planning.plan import Plan, Source
from qdist.core.text import command, parse_bytes
from qdist.host.opening import require_files, told
from qdist.host.run.rundir import RunDir
from qdist.host.sources.model_folder import require_same_original, require_same_tensors
from qdist.host.sources.models import locate
from qdist.host.sources.targets import ADAPTER, step_note
from qdist.host.terminal import say
from qdist.runtime.data.tokenizer import align_config, open_tokenizer
from qdist.runtime.formats.gptq_folder import in_safetensors
from qdist.runtime.formats.recorded_sums import digest_of_folder, require_adapter
from qdist.runtime.infer.plain import ROOM_TOKENS, has_room, open_plain
from qdist.runtime.infer.residence import arrange, choose, first_device, settle
from qdist.runtime.model.own_code import run_code_for
from qdist.runtime.model.skeleton import DTYPES, load_backbone
from qdist.runtime.quantize.bitsandbytes import packed_folder
from qdist.runtime.quantize.materialize import materialize


def holds_copy(
    target: str, free: int, asked: Questions | int, *, dtype: str = "auto", max_memory_bytes: int | None
) -> bool:
    """Whether a GPU with so many free bytes has room for all of a run or model, and for what it is asked.

    asked: answers in rows of one cache; or tokens of all sequences together, where they have a cache each.
    """
    run = RunDir(target)
    if not run.exists():
        tokens = asked.tokens if isinstance(asked, Questions) else asked
        return has_room(materialize(locate(target)), dtype, tokens, free, max_memory_bytes)
    plan = answering_plan(run, needs_tokenizer=True)
    parts = parts_of(plan, DTYPES[plan.compute_dtype if dtype == "auto" else dtype])
    counted = answering_footprint(parts, asked) if isinstance(asked, Questions) else count_in_use(parts, tokens=asked)
    return counted.alone <= room(free, max_memory_bytes)


TOKENIZER = "tokenizer"
"""Folder in a run with its tokenizer, as the cache had it when the run began."""


class Opened(NamedTuple):
    """A model ready to generate."""

    model: Any
    tokenizer: Any
    """None if there is none."""
    where: str
    """Which GPUs it is on, as a line for people."""


def load(
    run_or_model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_memory: str | int | None = None,
) -> tuple[Any, Any]:
    """A transformers model ready to generate, and its tokenizer, or None if there is none.

    A backbone goes to the first GPU with room for it, its adapter and 2,048 tokens; else its layers are spread over
    the GPUs; else as many as need be are offloaded to host memory. Without a GPU it goes to the CPU.

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
    """`load`, with the memory to leave for tokens.

    tokens: prompts and answers of all sequences together, for whose keys and values room is left.
    needs_tokenizer: refuse a model without one, before its weights are read.
    """
    require_dtype(dtype)
    run = RunDir(run_or_model)
    if not run.exists():
        name = str(run_or_model)
        return Opened(
            *open_plain(name, dtype, device, max_memory_bytes, tokens=tokens, needs_tokenizer=needs_tokenizer)
        )
    plan = answering_plan(run, needs_tokenizer=needs_tokenizer)
    chosen = DTYPES[plan.compute_dtype if dtype == "auto" else dtype]
    residence = residence_of(plan, chosen, device=device, max_memory_bytes=max_memory_bytes, tokens=tokens)
    model, tokenizer = load_run(run, chosen, residence)
    return Opened(model, tokenizer, str(residence))


def require_dtype(dtype: str) -> None:
    """Raise SpecError for what is no dtype to compute in, and not auto."""
    if dtype != "auto" and dtype not in DTYPES:
        raise SpecError(f"dtype cannot be {dtype!r}", try_="auto, bfloat16, float16 or float32")


def answering_plan(run: RunDir, *, needs_tokenizer: bool) -> Plan:
    """The plan of a run that has an adapter, and a tokenizer if one is needed."""
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
    """The run's plan. If the cache was emptied since, its tokenizer is the run's own copy, or the adapter's.

    Code of the model's own that the run was allowed to execute is executed here, before anything is opened with it.
    """
    plan = run.plan()
    run_code_for(plan.source)
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
    """Where to place a run's backbone and adapter on this machine; see `footprint` and `choose`."""
    parts = footprint_of(plan, dtype, tokens=tokens, scored=scored)
    return choose(parts, device=device, max_memory_bytes=max_memory_bytes)


def footprint_of(plan: Plan, dtype: torch.dtype, *, tokens: int, scored: int = 0) -> Footprint:
    """Memory that a run's backbone and adapter take in use; see `footprint`."""
    return count_in_use(parts_of(plan, dtype), tokens=tokens, scored=scored)


def parts_of(plan: Plan, dtype: torch.dtype, *, rank_r: int | None = None) -> Sizes:
    """The parts of a run's backbone and adapter. rank_r: of all adapters on it, if not of the run's alone."""
    spec = plan.spec
    job = TrainingShape(
        bits=plan.packing.linear_bits if plan.packing else spec.bits,
        double_quant=spec.quant.double,
        mxfp4=plan.packing is not None and plan.packing.type == "mxfp4",
        gptq=plan.source.gptq,
        compute_bytes=dtype.itemsize,
        rank_r=spec.lora.r if rank_r is None else rank_r,
        targets=spec.lora.targets,
        adapter=plan.adapter,
        seq_len=1,
    )
    return sizes(plan.facts, job)


def load_run(run: RunDir, dtype: torch.dtype, residence: Residence) -> tuple[Any, Any]:
    """A run's backbone with its adapter, placed as given, and the run's tokenizer."""
    require_adapter(run.adapter)
    plan = plan_of(run)
    backbone = load_backbone(
        with_packed(plan),
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=dtype,
        device=first_device(residence),
        facts=plan.facts,
        arrange=partial(arrange, residence=residence),
    )
    config = read_adapter_config(run)
    with told(f"{run.adapter} cannot be read", RunError, try_=command("gather", run.path)):
        model = _with_adapter(backbone, run.adapter, config)
    model.eval()
    settle(model, residence)
    tokenizer = load_tokenizer(plan.source)
    if tokenizer is not None:
        align_config(model, tokenizer, plan.ends)
    model.config.use_cache = True
    return model, tokenizer


def read_adapter_config(run: RunDir) -> Any:
    """PEFT's configuration of a run's adapter."""
    from peft import PeftConfig

    again = command("gather", run.path)
    require_files(run.adapter, RunError, try_=again)
    with told(f"{run.adapter} cannot be read", RunError, try_=again):
        return PeftConfig.from_pretrained(str(run.adapter))


def _with_adapter(backbone: Any, folder: Path, config: Any) -> Any:
    """A PEFT model with the adapter of a folder."""
    from peft import PeftModel
    from safetensors.torch import load_file

    from qdist.runtime.adapters.attach import FusedLora, adapt, fill_adapter

    if not config.target_parameters:
        config._register_custom_module({nn.Linear: FusedLora})
        # The file is read into host memory: PEFT's own choice is all of it on GPU 0, beside the matrices that it fills.
        return PeftModel.from_pretrained(backbone, str(folder), config=config, torch_device="cpu")
    model = adapt(backbone, config)
    lacking, unknown = fill_adapter(model, load_file(folder / ADAPTER))
    if lacking or unknown:
        raise RunError(f"{folder} is an adapter of another model: {[*lacking, *unknown][0]}", try_="that model's run")
    return model


def load_tokenizer(source: Source) -> Any:
    """The repaired tokenizer of a run, or None for random weights."""
    if not source.tokenizer:
        return None
    return open_tokenizer(
        Path(source.tokenizer), f"{source.tokenizer} has no tokenizer", try_="the run's adapter folder"
    )


def with_packed(plan: Plan) -> Source:
    """A run's source with packed weights that exist: packed again if the cache was emptied since.

    Raises ModelError if they are gone, RunError where others are in their place.
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
        packed = packed_folder(Path(source.path), packing_of(spec, source.config), name=spec.model).folder
    digest = digest_of_folder(packed)
    if source.digest not in ("", digest):
        say(
            f"warning: {source.path} was packed to other bytes than those that the run was trained on: by other "
            "versions, or on another device",
            err=True,
        )
    return msgspec.structs.replace(source, packed=str(packed), digest=digest)


def with_model(plan: Plan) -> Source:
    """A run's source with a model that exists: converted or downloaded again if the cache was emptied since.

    Raises ModelError if it is gone.
    """
    source = plan.source
    if Path(source.path).is_dir():
        return source
    from qdist.runtime.quantize.materialize import materialize

    try:
        found = materialize(locate(plan.spec.model), trusted=plan.spec.trust_remote_code)
    except (ModelError, MachineError) as error:
        raise ModelError(
            f"{source.path}, which the run was trained on, is gone, and so is what was packed from it: {error.message}",
            try_="put the model back where it was",
        ) from error
    return msgspec.structs.replace(source, path=str(found))
