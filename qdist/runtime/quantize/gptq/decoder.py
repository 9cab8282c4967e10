"""A model with one decoder layer loaded at a time; the rest stays on the meta device."""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.core.model.shapes import Reads
from qdist.core.planning.unsupported import require_dense
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.parts import items_returned
from qdist.runtime.quantize.blueprint import Blueprint
from qdist.runtime.quantize.tensors import Tensors

_STEPS: tuple[Reads, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_out")
"""Inputs of a decoder layer's linears, in order of computation."""
_TO_LAYER = re.compile(r"^(.*?)\.\d+\.")
_OF_A_PAGE = 1 << 10
"""32-bit numbers per page of memory; 16-bit ones fill half a page."""


class Start(NamedTuple):
    """The inputs of the first decoder layer."""

    hidden: list[torch.Tensor]
    """[samples, tokens, hidden] for each batch."""
    arguments: tuple[dict[int, dict[str, Any]], ...]
    """Other arguments of each layer, masks and positions, by batch size; all samples have one length.
    """


class Decoder:
    """Layers of a model folder, loaded on demand."""

    def __init__(self, shape: Blueprint, tensors: Tensors) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.shape, self._tensors = shape, tensors
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(shape.config, trust_remote_code=False).eval()
        self.facts = facts_of(shape.config, name=shape.architecture)
        require_dense(self.facts, what="GPTQ")
        found = _TO_LAYER.match(min(shape.linears))
        assert found is not None  # blueprint found each linear by the number of its layer
        self._list = found[1]

    def path(self, position: int) -> str:
        """Module path of a decoder layer, such as `model.layers.3`."""
        return f"{self._list}.{position}"

    def names(self, position: int) -> list[str]:
        """Names of the tensors of a decoder layer, or of everything else."""
        return [name for name in self.shape.shapes if self.shape.layer(name) == position]

    def steps(self, position: int) -> list[list[str]]:
        """Paths of a layer's linears in order of computation, grouped by the tensor they read."""
        reads = {linear.name: linear.reads for linear in self.facts.linears}
        paths = [name.removesuffix(".weight") for name in self.names(position) if name in self.shape.linears]
        steps = [[path for path in paths if reads[path.rpartition(".")[2]] == step] for step in _STEPS]
        return [step for step in steps if step]

    def layer(
        self, position: int, read: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """A decoder layer with the weights from `read`, which are freed when it is dropped."""
        path = self.path(position)
        layer: nn.Module = copy.deepcopy(self._model.get_submodule(path))
        there = {name: value.to(device, non_blocking=True) for name, value in read.items()}
        values = {name.removeprefix(f"{path}."): _as_computed(value, dtype) for name, value in there.items()}
        layer.load_state_dict(values, assign=True)
        return layer.to(device).requires_grad_(False)

    def read(self, position: int, *, pin: bool) -> dict[str, torch.Tensor]:
        """The tensors of a decoder layer as stored, read from disk.

        pin: copy them to page-locked memory, which a GPU reads several times as fast. Without it the file's own pages.
        """
        values = {name: self._tensors.read(name) for name in self.names(position)}
        if pin:
            return {name: value.pin_memory() for name, value in values.items()}
        for value in values.values():
            value.flatten()[::_OF_A_PAGE].sum()  # a number of each page, so that it is read now
        return values

    @torch.no_grad()
    def start(self, batches: Sequence[torch.Tensor], dtype: torch.dtype) -> Start:
        """Embed samples, int64 [samples, tokens] each, on the CPU, and record the arguments of decoder layers."""
        prefix = f"{self.shape.prefix}."
        outer = [name for name in self.names(self.shape.layers) if name.startswith(prefix)]
        values = {name.removeprefix(prefix): _as_computed(self._tensors.read(name), dtype) for name in outer}
        base = self._model.get_submodule(self.shape.prefix)
        base.load_state_dict(values, assign=True, strict=False)
        parent, _, leaf = self._list.rpartition(".")
        real: Any = self._model.get_submodule(self._list)
        last = self.shape.layers - 1
        in_tuple = items_returned(type(real[0])) > 0
        recorders = [_Recorder(last=position == last, in_tuple=in_tuple) for position in range(last + 1)]
        setattr(self._model.get_submodule(parent), leaf, nn.ModuleList(recorders))
        hidden = []
        for batch in batches:
            with suppress(Reached):
                base(input_ids=batch, use_cache=False)
            hidden.append(recorders[0].hidden)
        setattr(self._model.get_submodule(parent), leaf, real)
        for name in values:
            owner, _, attribute = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(values[name], device="meta"), requires_grad=False)
            setattr(base.get_submodule(owner), attribute, empty)
        return Start(hidden, tuple(recorder.arguments for recorder in recorders))


def _as_computed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class Reached(Exception):
    """Ends a forward pass that has come far enough."""


class _Recorder(nn.Module):
    """Stand-in for a decoder layer: records its arguments and passes hidden states on; the last one ends the pass."""

    def __init__(self, *, last: bool, in_tuple: bool) -> None:
        super().__init__()
        self._last, self._in_tuple = last, in_tuple
        self.hidden = torch.empty(0)
        self.arguments: dict[int, dict[str, Any]] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> Any:
        self.hidden, self.arguments[len(hidden)] = hidden, arguments
        if self._last:
            raise Reached
        return (hidden,) if self._in_tuple else hidden


def moved(value: Any, device: torch.device) -> Any:
    """A layer's argument with all its tensors moved to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    return value
