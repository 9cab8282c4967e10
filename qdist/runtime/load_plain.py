"""Opens a model that is no run, with its weights as they are stored: on one GPU, or where accelerate lays its parts."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError, PlanError, SpecError
from qdist.core.facts import from_config
from qdist.core.gptq import Gptq
from qdist.core.gpu_context import CUDA_CONTEXT_BYTES
from qdist.core.plan import Source
from qdist.core.residence import Residence, footprint, room
from qdist.core.spec import Quant
from qdist.core.units import GIB, format_bytes
from qdist.host.checkpoints import stated
from qdist.host.opening import reason_of, require_files, told
from qdist.host.sources import locate, read_json
from qdist.runtime.gptq.check import checked
from qdist.runtime.gptq.pickled import in_safetensors
from qdist.runtime.materialize import materialize
from qdist.runtime.methods.backbone import DTYPES, load_backbone, load_plain
from qdist.runtime.methods.skeleton import decoder_layers
from qdist.runtime.placements.residence import arrange, choose, first_device, free_bytes, on_device, settle
from qdist.runtime.quantize_source import blueprint
from qdist.runtime.recorded_sums import verify_folder
from qdist.runtime.special_tokens import align_config, repair
from qdist.runtime.tokenizer import BESIDE, has_tokenizer, open_tokenizer

_WORK_BYTES = GIB
"""Left free on each GPU for keys, values and what layers compute: the shapes of a model that is no run are not read."""
_ROOM_TOKENS = 2048
"""The same for a GPTQ checkpoint, whose shapes are."""


class Plain(NamedTuple):
    """A model, its tokenizer or None, and where it lies."""

    model: Any
    tokenizer: Any
    where: str


def open_plain(
    name: str, dtype: str, device: str | None, max_memory_bytes: int | None, *, needs_tokenizer: bool = False
) -> Plain:
    """A model by alias, folder, GGUF file or hub id; see `qdist.runtime.load.open_model`."""
    if max_memory_bytes is not None and (device is not None or not torch.cuda.is_available()):
        raise SpecError(f"max_memory is of GPUs to choose from; here is {device or 'none'}", try_="without max_memory")
    folder = materialize(locate(name))
    tokenizer = open_tokenizer_of(folder, name) if needs_tokenizer or has_tokenizer(folder) else None
    wanted = dtype if dtype == "auto" else DTYPES[dtype]
    gptq = stated(folder)
    if gptq is None:  # transformers reads it, which knows of no sums
        verify_folder(folder)
    if gptq is not None:
        model, where = _gptq(folder, gptq, wanted, device, max_memory_bytes)
    elif device is not None or not torch.cuda.is_available():
        model, where = _on(folder, wanted, torch.device(device or "cpu"))
    else:
        model, where = _where_there_is_room(folder, wanted, max_memory_bytes)
    model.eval()
    if tokenizer is not None:
        repair(tokenizer, model.config.to_dict())
        align_config(model, tokenizer)
    return Plain(model, tokenizer, where)


def open_tokenizer_of(folder: Path, name: str) -> Any:
    """The tokenizer of a model, as it is. Raises ModelError where there is none."""
    lacking = f"{name} has no tokenizer to read prompts with"
    if not has_tokenizer(folder):
        raise ModelError(lacking, try_=BESIDE)
    return open_tokenizer(folder, lacking)


def _gptq(
    folder: Path, gptq: Gptq, dtype: torch.dtype | str, device: str | None, cap_bytes: int | None
) -> tuple[Any, str]:
    """A GPTQ checkpoint in our own layers; transformers would want GPTQModel for it."""
    shape, folder = blueprint(folder), in_safetensors(folder)
    facts = from_config(shape.config.to_dict(), name=str(folder))
    found = checked(folder, shape, gptq)
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES[found.scales]
    parts = footprint(
        facts, bits=4, double_quant=False, gptq=found, compute_bytes=chosen.itemsize, tokens=_ROOM_TOKENS, scored=0
    )
    residence = choose(parts, device=device, max_memory_bytes=cap_bytes)
    source = Source(
        kind="folder", path=str(folder), packed=str(folder), gptq=found, config=shape.config.to_dict(), tokenizer=""
    )
    model = load_backbone(
        source, bits=4, quant=Quant(), dtype=chosen, device=first_device(residence), linear_names=facts.linear_names,
        arrange=partial(arrange, residence=residence),
    )  # fmt: skip
    settle(model, residence)
    model.config.use_cache = True
    return model, str(residence)


def _on(folder: Path, dtype: torch.dtype | str, device: torch.device) -> tuple[Any, str]:
    return load_plain(str(folder), dtype=dtype, device=device), str(on_device(device, layers=1))


def _where_there_is_room(folder: Path, dtype: torch.dtype | str, cap_bytes: int | None) -> tuple[Any, str]:
    """On the first GPU with room for all of it; else layers over the GPUs, and host memory behind them."""
    rooms = [room(free, cap_bytes) - CUDA_CONTEXT_BYTES - _WORK_BYTES for free in free_bytes()]
    size = _stored_bytes(folder) * (2 if dtype == torch.float32 else 1)
    for gpu, own in enumerate(rooms):
        if size <= own:
            return _on(folder, dtype, torch.device("cuda", gpu))
    from transformers import AutoModelForCausalLM

    budgets: dict[int | str, int] = {gpu: own for gpu, own in enumerate(rooms) if own > 0}
    if not _is_quantized(folder):  # packed layers cannot compute where their weights are not
        budgets["cpu"] = size
    try:
        require_files(folder, ModelError)
        with told(str(folder), ModelError, try_="a folder with config.json and *.safetensors"):
            model = AutoModelForCausalLM.from_pretrained(
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


def _stored_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / "config.json")


def _residence(model: Any) -> Residence:
    """What accelerate decided, layer by layer; what waits visits the last GPU."""
    devices = [next(layer.parameters()).device for layer in decoder_layers(model)]
    last = max((device.index for device in devices if device.type == "cuda"), default=0)
    layer_gpu = tuple(device.index if device.type == "cuda" else last for device in devices)
    waiting = tuple(index for index, device in enumerate(devices) if device.type != "cuda")
    return Residence(layer_gpu=layer_gpu, offloaded=waiting)
