"""A model on the meta device with linears ready for packed bytes; and filling it, entirely or with a rank's part."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdist.core.errors import ModelError
from qdist.core.model.shapes import Experts, ModelFacts
from qdist.core.model.storage import stores_mxfp4
from qdist.core.planning.plan import Source
from qdist.core.spec.sections import Quant
from qdist.host.opening import require_files, told
from qdist.runtime.data.tokenizer import add_rows
from qdist.runtime.formats.recorded_sums import expected_sums
from qdist.runtime.kernels.gptq_bits import require_whole_words
from qdist.runtime.model.classes import choose_attention, class_of, config_of, empty_model
from qdist.runtime.model.experts import compute_experts, is_experts, is_transposed
from qdist.runtime.model.packed import Packed4bit, Packed8bit, Slices, is_offloaded
from qdist.runtime.model.packed_experts import PackedMatrices, packed_matrices
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.model.sliced import Sliced
from qdist.runtime.model.weights import (
    FolderWeights,
    ModelWeights,
    RandomWeights,
    Stored,
    Weights,
    stored_buffers,
    whole,
)


def open_config(folder: Path) -> Any:
    """transformers' configuration. Raises ModelError."""
    from transformers import AutoConfig

    require_files(folder, ModelError)
    with refused(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """Raise ModelError that blames the folder's config.json for what transformers raises in this block."""
    with told(f"{folder}/config.json: transformers makes no model of it", ModelError, try_="its published config.json"):
        yield


def config_behind(source: Source) -> Any:
    """transformers' configuration of a run's model. A run whose model is gone goes by its plan."""
    if source.path and Path(source.path).is_dir():
        return open_config(Path(source.path))
    return config_of(source.config)


def skeleton(source: Source, *, bits: int, quant: Quant, dtype: torch.dtype, facts: ModelFacts) -> Any:
    """A causal language model whose parameters are on the meta device; its buffers are real.

    facts: say which linears and experts inside decoder layers are packed to `bits`; linears beside experts that come in
    MXFP4 stay in 16 bits, as they come.
    """
    model = empty_model(config_behind(source), dtype=dtype)
    model.qdist_parts = facts.modules
    mxfp4 = bits == 4 and stores_mxfp4(source.config)
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or not facts.packs(path):
            continue
        linear = module if isinstance(module, nn.Linear) else _as_linear(module)
        if bits < 16 and not mxfp4:
            linear = _packed(linear, path, source, bits, quant, dtype)
        if linear is not module:
            model.set_submodule(path, linear)
        linear.is_transposed = isinstance(module, Conv1D)
    for path, experts in facts.experts.items():
        _pack_experts(model.get_submodule(path), experts, bits, quant, mxfp4=mxfp4)
        compute_experts(model.get_submodule(path), path)
    model.requires_grad_(False)
    model.config.use_cache = False
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # RWKV divides weights in place for inference in float16: packed bytes, here
    return model.eval()


def _as_linear(module: Conv1D) -> nn.Linear:
    """A linear for a `Conv1D`, whose matrix it holds as [outputs, inputs]."""
    linear = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
    linear.bias = module.bias
    return linear


def _packed(linear: nn.Linear, path: str, source: Source, bits: int, quant: Quant, dtype: torch.dtype) -> nn.Linear:
    bias = linear.bias is not None
    if source.gptq:
        shape = source.gptq.of(path)
        if shape is None:
            return linear
        require_whole_words(path, shape.bits, inputs=linear.in_features, outputs=linear.out_features)
        return PackedGptq(
            linear.in_features, linear.out_features, bias=bias, dtype=dtype, shape=shape,
            offset=source.gptq.zero_offset, ordered=source.gptq.desc_act,
            scale_dtype=getattr(torch, source.gptq.scales),
            shift=source.gptq.offset if source.gptq.offset and source.gptq.offset.of(path) else None,
        )  # fmt: skip
    if bits == 4:
        return Packed4bit(linear.in_features, linear.out_features, bias=bias, dtype=dtype, quant=quant)
    return Packed8bit(linear.in_features, linear.out_features, bias=bias, dtype=dtype)


def _pack_experts(module: nn.Module, experts: Experts, bits: int, quant: Quant, *, mxfp4: bool) -> None:
    """Replace the parameters of an experts' module by empty modules of the same names."""
    if bits == 16:
        return
    for matrix in experts.matrices:
        count, rows, columns = module.get_parameter(matrix.name).shape
        delattr(module, matrix.name)
        packed = packed_matrices(
            (count, rows, columns), transposed=is_transposed(module), bits=bits, quant=quant, mxfp4=mxfp4
        )
        module.add_module(matrix.name, packed)


def fill(model: nn.Module, weights: Weights, *, device: torch.device) -> None:
    """Load the values of parameters and stored buffers, and move other buffers, a module at a time.

    No more than one module's tensors are held besides.

    Of a sliced parameter this rank's bytes are read and no others. The weights of a linear that is marked `offloaded`
    stay in pinned host memory.
    device: where modules lie that do not say so themselves, with an attribute `runs_on`.
    Raises ModelError where what was read is not what was written.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        place = getattr(module, "runs_on", device)
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        # A tied head finds its table filled already, and need not be in the folder.
        buffers = stored_buffers(module)
        is_read = bool(buffers) or any(parameter not in filled for parameter in own.values())
        tensors = weights.of(path, module) if is_read else {}
        for name, parameter in own.items():
            if parameter not in filled:
                filled[parameter] = _filled(parameter, tensors[name], place)
                if is_offloaded(module) and not name.endswith("bias"):
                    filled[parameter] = _in_host_memory(filled[parameter], place)
            module.register_parameter(name, filled[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            is_stored = buffer.is_meta or (name in buffers and name in tensors)
            values = whole(tensors[name]) if is_stored else buffer
            setattr(module, name, values.to(place, _dtype_of_buffer(model, f"{path}.{name}", buffer)))
        if is_offloaded(module):
            module.runs_on = place
    weights.check()


def _dtype_of_buffer(model: Any, path: str, buffer: torch.Tensor) -> torch.dtype:
    """A buffer's dtype, which is float32 where transformers keeps it so beside weights in 16 bits."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(name in path for name in kept) else buffer.dtype


def offload(model: Any, layers: Sequence[int]) -> None:
    """Mark the linears and experts of decoder layers as offloaded.

    Their weights stay in host memory and visit the GPU for each use.
    """
    stack = decoder_layers(model)
    for module in (module for index in layers for module in stack[index].modules()):
        if isinstance(module, nn.Linear | PackedMatrices) or is_experts(module):
            module.offloaded = True


def _in_host_memory(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    held = parameter.detach().cpu()
    return nn.Parameter(held.pin_memory() if device.type == "cuda" else held, requires_grad=False)


def _filled(parameter: nn.Parameter, values: Slices, device: torch.device) -> nn.Parameter:
    if isinstance(parameter, Sliced):
        _fill_slice(parameter, values)
        return parameter
    whole_values = (
        values.to(device, parameter.dtype) if isinstance(values, Stored) else values[:].to(device, parameter.dtype)
    )
    return nn.Parameter(whole_values, requires_grad=False)


def _fill_slice(parameter: Sliced, values: Slices) -> None:
    part, first = parameter.kept_elements, parameter.first_element
    if isinstance(values, Stored):
        values.fill_part(part, first, parameter.group)
    else:
        part.copy_(whole(values).reshape(-1)[first : first + len(part)])


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Arrange = Callable[[Any], None]
"""Removes or shards what a rank does not hold, before the model has storage."""


def load_backbone(
    source: Source,
    *,
    bits: int,
    quant: Quant,
    dtype: torch.dtype,
    device: torch.device,
    facts: ModelFacts,
    arrange: Arrange | None = None,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """A frozen transformers causal language model with its decoder linears packed to `bits`.

    dtype: of what is not packed, and of the arithmetic.
    facts: say which linears are packed.
    share: (which, of how many) of the processes that map the same packed folder, and read it on each other's behalf.
    Raises ModelError where packed bytes are not those that were written.
    """
    model = skeleton(source, bits=bits, quant=quant, dtype=dtype, facts=facts)
    if arrange is not None:
        arrange(model)
    weights: Weights
    if source.kind == "dummy":
        weights = RandomWeights(device, dtype)
    elif source.packed:
        weights = FolderWeights(source.packed, expected_sums(source), share=share)
    else:
        plain = load_plain(source.path, dtype="auto", device=torch.device("cpu"))
        weights = ModelWeights(plain, device=device, dtype=dtype)
    fill(model, weights, device=device)
    add_rows(model, source.new_token_ids, source.vocab_rows)
    return model.requires_grad_(False)


def load_plain(path: str, *, dtype: torch.dtype | str, device: torch.device) -> Any:
    """A model with its weights as stored."""
    folder = Path(path)
    require_files(folder, ModelError)
    with told(path, ModelError, try_="a folder with config.json and *.safetensors"):
        config = open_config(folder)
        choose_attention(config)
        return class_of(config).from_pretrained(
            path, config=config, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
        )
