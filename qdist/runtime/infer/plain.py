"""Opens a model that is no run: a folder, a GPTQ checkpoint, what the hub has."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError, PlanError, SpecError
from qdist.core.model.gptq import Gptq
from qdist.core.planning.inference import Residence, cache_bytes, footprint, room
from qdist.core.planning.plan import Source
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES
from qdist.core.spec.sections import Quant
from qdist.core.text import GIB, format_bytes
from qdist.host.opening import reason_of, require_files, told
from qdist.host.sources.model_folder import stated
from qdist.host.sources.models import locate, read_json
from qdist.runtime.data.tokenizer import BESIDE, align_config, has_tokenizer, open_tokenizer, repair
from qdist.runtime.formats.gptq_folder import in_safetensors
from qdist.runtime.formats.recorded_sums import verify_folder
from qdist.runtime.infer.residence import arrange, choose, first_device, free_bytes, on_device, settle
from qdist.runtime.model.classes import class_of, content_of
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.model.skeleton import DTYPES, load_backbone, load_plain, open_config
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq.check import checked
from qdist.runtime.quantize.materialize import materialize

ROOM_TOKENS = 2048
"""Tokens, over all sequences, whose keys and values room is left for by default."""
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
    """A model by alias, folder, GGUF file or hub id; see `qdist.runtime.infer.load.open_model`.

    tokens: of all sequences together, for whose keys and values room is left.
    """
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
    size, cached = _bytes_in_use(folder, dtype, 0), _bytes_in_use(folder, dtype, tokens)
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
    """Bytes of a GPU that a model may fill, with its keys and values."""
    return room(free, cap_bytes) - CUDA_CONTEXT_BYTES - _WORK_BYTES


def has_room(folder: Path, dtype: str, tokens: int, free: int, cap_bytes: int | None) -> bool:
    """Whether a GPU with so many free bytes has room for a model, and for the keys and values of so many tokens."""
    return _bytes_in_use(folder, DTYPES.get(dtype, dtype), tokens) <= _room_beside_work(free, cap_bytes)


def _bytes_in_use(folder: Path, dtype: torch.dtype | str, tokens: int) -> int:
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
