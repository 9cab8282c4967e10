"""Opens a run or a model for use: `model, tokenizer = qdist.load(RUN_OR_MODEL)`."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.errors import MachineError, ModelError, PlanError, RunError, SpecError
from qdist.core.model.gptq import Gptq
from qdist.core.model.storage import packing_of
from qdist.core.planning.answering import Questions, answering_footprint
from qdist.core.planning.inference import Footprint, Residence, cache_bytes, count_in_use, footprint, room
from qdist.core.planning.memory import Sizes, TrainingShape, sizes
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES
from qdist.core.spec.sections import Quant
from qdist.core.text import GIB, command, format_bytes, parse_bytes
from qdist.host.opening import reason_of, require_files, told
from qdist.host.run.rundir import RunDir
from qdist.host.sources.model_folder import require_same_original, require_same_tensors, stated
from qdist.host.sources.models import locate, read_json
from qdist.host.sources.targets import ADAPTER, step_note
from qdist.host.terminal import say
from qdist.runtime.data.tokenizer import BESIDE, align_config, has_tokenizer, open_tokenizer, repair
from qdist.runtime.formats.gptq_folder import in_safetensors
from qdist.runtime.formats.recorded_sums import digest_of_folder, require_adapter, verify_folder
from qdist.runtime.infer.residence import arrange, choose, first_device, free_bytes, on_device, settle
from qdist.runtime.model.classes import class_of, content_of
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.own_code import run_code_for
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.model.skeleton import DTYPES, load_backbone, load_plain, open_config
from qdist.runtime.quantize.bitsandbytes import packed_folder
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq.check import checked
from qdist.runtime.quantize.materialize import materialize

_WORK_BYTES = GIB
"""Bytes left free per GPU for activations, for models that are no run."""


class Plain(NamedTuple):
    """A model, its tokenizer or None, and where it is placed."""

    model: Any
    tokenizer: Any
    where: str


def open_plain(
    name: str,
    dtype: str,
    device: str | None,
    max_memory_bytes: int | None,
    *,
    tokens: int,
    needs_tokenizer: bool = False,
) -> Plain:
    """A model by alias, folder, GGUF file or hub id; see `qdist.runtime.infer.load.open_model`."""
    if max_memory_bytes is not None and (device is not None or not torch.cuda.is_available()):
        raise SpecError(f"max_memory is of GPUs to choose from; here is {device or 'none'}", try_="without max_memory")
    folder = materialize(locate(name))
    tokenizer = open_tokenizer_of(folder, name) if needs_tokenizer or has_tokenizer(folder) else None
    wanted = dtype if dtype == "auto" else DTYPES[dtype]
    gptq = stated(folder)
    if gptq is None:  # transformers reads it, which knows of no sums
        verify_folder(folder)
    if gptq is not None:
        model, where = _gptq(folder, gptq, wanted, device, max_memory_bytes, tokens)
    elif device is not None or not torch.cuda.is_available():
        model, where = _on(folder, wanted, torch.device(device or "cpu"))
    else:
        model, where = _where_there_is_room(folder, wanted, max_memory_bytes, tokens)
    model.eval()
    if tokenizer is not None:
        repair(tokenizer, model.config.to_dict())
        align_config(model, tokenizer)
    return Plain(model, tokenizer, where)


def open_tokenizer_of(folder: Path, name: str) -> Any:
    """The tokenizer of a model, unchanged. Raises ModelError if there is none."""
    lacking = f"{name} has no tokenizer to read prompts with"
    if not has_tokenizer(folder):
        raise ModelError(lacking, try_=BESIDE)
    return open_tokenizer(folder, lacking)


def _gptq(
    folder: Path, gptq: Gptq, dtype: torch.dtype | str, device: str | None, cap_bytes: int | None, tokens: int
) -> tuple[Any, str]:
    """A GPTQ checkpoint in qdist's own layers; transformers would need GPTQModel for it."""
    shape, folder = blueprint(folder), in_safetensors(folder)
    facts = facts_of(shape.config, name=str(folder))
    found = checked(folder, shape, gptq)
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES[found.scales]
    parts = footprint(
        facts, bits=4, double_quant=False, gptq=found, compute_bytes=chosen.itemsize, tokens=tokens,
        at_a_time=ROOM_TOKENS, scored=0,
    )  # fmt: skip
    residence = choose(parts, device=device, max_memory_bytes=cap_bytes)
    source = Source(
        kind="folder", path=str(folder), packed=str(folder), gptq=found, config=content_of(shape.config), tokenizer=""
    )
    model = load_backbone(
        source, bits=4, quant=Quant(), dtype=chosen, device=first_device(residence), facts=facts,
        arrange=partial(arrange, residence=residence),
    )  # fmt: skip
    settle(model, residence)
    model.config.use_cache = True
    return model, str(residence)


def _on(folder: Path, dtype: torch.dtype | str, device: torch.device) -> tuple[Any, str]:
    return load_plain(str(folder), dtype=dtype, device=device), str(on_device(device, layers=1))


def _where_there_is_room(folder: Path, dtype: torch.dtype | str, cap_bytes: int | None, tokens: int) -> tuple[Any, str]:
    """On the first GPU with room for all of it, else spread over the GPUs with host memory as overflow."""
    rooms = [_room_beside_work(free, cap_bytes) for free in free_bytes()]
    size, cached = _plain_bytes(folder, dtype, 0), _plain_bytes(folder, dtype, tokens)
    for gpu, own in enumerate(rooms):
        if cached <= own:
            return _on(folder, dtype, torch.device("cuda", gpu))
    budgets: dict[int | str, int] = {gpu: own for gpu, own in enumerate(rooms) if own > 0}
    if not _is_quantized(folder):  # packed layers cannot compute where their weights are not
        budgets["cpu"] = size
    try:
        require_files(folder, ModelError)
        with told(str(folder), ModelError, try_="a folder with config.json and *.safetensors"):
            model = class_of(open_config(folder)).from_pretrained(
                str(folder),
                dtype=dtype,
                device_map="auto",
                max_memory=budgets,
                local_files_only=True,
                trust_remote_code=False,
            )
    except ModelError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        # accelerate's: nowhere left to put a part
        raise PlanError(
            f"{folder} takes {format_bytes(size)}; there is room for {', '.join(map(format_bytes, rooms))}: "
            f"{reason_of(error.__cause__)}",
            try_="more free GPU memory",
        ) from error
    return model, str(_residence(model))


def _room_beside_work(free: int, cap_bytes: int | None) -> int:
    return room(free, cap_bytes) - CUDA_CONTEXT_BYTES - _WORK_BYTES


def holds_copy(
    target: str, free: int, asked: Questions | int, *, dtype: str = "auto", max_memory_bytes: int | None
) -> bool:
    """Whether a GPU with so many free bytes has room for all of a run or model, and for what it is asked.

    asked: answers in rows of one cache; or tokens of all sequences together, where they have a cache each.
    """
    run = RunDir(target)
    if not run.exists():
        folder, tokens = materialize(locate(target)), asked.tokens if isinstance(asked, Questions) else asked
        own = _plain_bytes(folder, DTYPES.get(dtype, dtype), tokens)
        return own <= _room_beside_work(free, max_memory_bytes)
    plan = answering_plan(run, needs_tokenizer=True)
    parts = parts_of(plan, DTYPES[plan.compute_dtype if dtype == "auto" else dtype])
    counted = answering_footprint(parts, asked) if isinstance(asked, Questions) else count_in_use(parts, tokens=asked)
    return counted.alone <= room(free, max_memory_bytes)


def _plain_bytes(folder: Path, dtype: torch.dtype | str, tokens: int) -> int:
    """Bytes of a model that is no run, with the keys and values of so many tokens.

    Those are not counted for a type whose shapes are not known.
    """
    is_wide = dtype == torch.float32
    size = _stored_bytes(folder) * (2 if is_wide else 1)
    try:
        facts = facts_of(read_json(folder / "config.json"), name=str(folder))
    except ModelError:
        return size
    return size + sum(cache_bytes(facts.shapes[run], 4 if is_wide else 2, tokens) for run in facts.run_of_layer)


def _stored_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / "config.json")


def _residence(model: Any) -> Residence:
    """The placement that accelerate chose, layer by layer; offloaded layers run on the last GPU."""
    devices = [next(layer.parameters()).device for layer in decoder_layers(model)]
    last = max((device.index for device in devices if device.type == "cuda"), default=0)
    layer_gpu = tuple(device.index if device.type == "cuda" else last for device in devices)
    waiting = tuple(index for index, device in enumerate(devices) if device.type != "cuda")
    return Residence(layer_gpu=layer_gpu, offloaded=waiting)


TOKENIZER = "tokenizer"
"""Folder in a run with its tokenizer, as the cache had it when the run began."""
ROOM_TOKENS = 2048
"""Tokens, over all sequences, whose keys and values room is left for by default."""


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
