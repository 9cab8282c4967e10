"""How do a model's linears compute while it answers, each row of a batch with an adapter of its own?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from qdist.core.errors import ModelError, SpecError, nearest
from qdist.runtime.adapters.attach import FusedLora
from qdist.runtime.adapters.sharing import readers_of_one_tensor
from qdist.runtime.infer.frozen import Form, Frozen, Unpacked, choose_form, dtype_of
from qdist.runtime.kernels.small_product import StackedAdapter
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.packed import PackedLinear, compute_dtype, is_offloaded

MOST_ROWS = 1024
"""Tokens whose masks have an address of their own, so that a CUDA graph of a step can read them."""


def prepare_linears(model: Any) -> "AdapterChoice":
    """Put linears made for answering in the place of a model's packed and adapted ones; no way back.

    model: of transformers, or PEFT's around it with one adapter or several, as `qdist.load` returns it. PEFT's float32
    matrices are dropped; adapters are copied in the compute dtype. All rows have PEFT's active adapter until told
    otherwise. Prepare it before a CUDA graph is captured.
    """
    names = tuple(getattr(model, "peft_config", ()))
    active = list(model.active_adapters) if names else []
    form = choose_form([_frozen_of(module) for group in _groups(model) for module in group.values()])
    choice = AdapterChoice(model, names, _why_one_adapter(model) if names else "", form.note)
    for members in list(_groups(model)):
        if len(members) > 1 or any(_gains(module) for module in members.values()):
            _replace(model, members, choice, form)
    choice.only(active[0] if active else "")
    return choice


class AdapterChoice:
    """Which adapter of a model each row has."""

    def __init__(self, model: Any, names: tuple[str, ...], reason: str, note: str) -> None:
        self.names = names
        """The adapters; number n is `names[n - 1]`, and 0 is the base."""
        self.reason = reason
        """Why all rows must have the same one, as a phrase; empty if they need not."""
        self.note = note
        """How frozen weights are kept, for people; empty if there is nothing to say."""
        self._model = model
        self._groups = list[_Group]()
        self._masks = dict[Any, _Mask]()

    def only(self, name: str) -> None:
        """Give all rows one adapter, or none for an empty name: there is no mask then."""
        if name and name not in self.names:
            close = nearest(name, self.names)
            raise SpecError(f"there is no adapter {name}", try_=close or f"one of {', '.join(self.names) or 'none'}")
        for group in self._groups:
            group.select(self.names.index(name) + 1 if name else 0)
        if not self.names:
            return
        if not name:
            self._model.base_model.disable_adapter_layers()
            return
        self._model.base_model.enable_adapter_layers()
        self._model.base_model.set_adapter(name, inference_mode=True)

    def set_rows(self, numbers: torch.Tensor) -> None:
        """Give each token of the next passes its adapter: int64 [tokens], 0 for the base.

        Writes to the device alone, so that it may be part of a CUDA graph, or come before its replay. Raises SpecError
        where all rows must have the same one.
        """
        if self.reason:
            raise SpecError(f"rows of one batch cannot have adapters of their own: {self.reason}", try_="one adapter")
        for group in self._groups:
            group.select(None)
        for mask in self._masks.values():
            mask.set(numbers)

    def mask_of(self, owners: Sequence[int], dtype: torch.dtype, device: torch.device) -> "_Mask":
        """The mask of ranks that belong to adapters of these numbers: one for all linears that are alike."""
        key = (tuple(owners), dtype, device)
        if key not in self._masks:
            self._masks[key] = _Mask(torch.tensor(owners, device=device), dtype)
        return self._masks[key]

    def add(self, group: "_Group") -> None:
        """Tell a group of linears of all changes."""
        self._groups.append(group)


class _Mask:
    """1 where a rank belongs to a token's adapter, else 0."""

    def __init__(self, owners: torch.Tensor, dtype: torch.dtype) -> None:
        self._owners = owners
        self._kept = torch.zeros((MOST_ROWS, len(owners)), dtype=dtype, device=owners.device)
        self._now = self._kept[:0]

    def set(self, numbers: torch.Tensor) -> None:
        """Adapters of the next tokens, int64 [tokens]."""
        found = numbers.to(self._owners.device).unsqueeze(1) == self._owners
        tokens = len(numbers)
        self._now = self._kept[:tokens].copy_(found) if tokens <= MOST_ROWS else found.to(self._kept.dtype)

    def of(self, tokens: int) -> torch.Tensor:
        """[tokens, ranks]. Raises ModelError if another number of tokens was given adapters."""
        if len(self._now) != tokens:
            raise ModelError(
                f"a linear reads {tokens:,} tokens, and {len(self._now):,} have adapters", try_="one adapter at a time"
            )
        return self._now


class AnsweringLinear(nn.Module):
    """A frozen linear with its adapters, computed together with those that read the same tensor."""

    def __init__(self, layer: nn.Linear, group: "_Group", index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._group, self._index = group, index
        frozen = group.frozen
        if isinstance(frozen, Unpacked):
            self.weight = nn.Parameter(frozen.weights[index], requires_grad=False)
        else:
            self.base_layer = layer
            self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._group.product(self._index, inputs)


class _Group:
    """Linears that read one tensor. The first to be called computes for all; the others take theirs."""

    def __init__(self, frozen: Frozen, count: int, adapters: "_Adapters | None") -> None:
        self.frozen, self._count, self._adapters = frozen, count, adapters
        self._one: StackedAdapter | None = None
        self._masked = False
        self._given: torch.Tensor | None = None
        self._waiting = dict[int, torch.Tensor]()

    def select(self, number: int | None) -> None:
        """Compute with the adapter of a number for all rows, 0 for none; or with the rows' own for None."""
        self._masked = number is None and self._adapters is not None
        self._one = self._adapters.of(number) if self._adapters and number else None

    def product(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """A linear's product with inputs [..., in]."""
        if inputs is not self._given or index not in self._waiting:
            self._given, self._waiting = inputs, dict(enumerate(self._products(inputs)))
        product = self._waiting.pop(index)
        if not self._waiting:
            self._given = None
        return product

    def _products(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        dtype = self.frozen.dtype
        flat = inputs.reshape(-1, inputs.shape[-1])
        if flat.dtype != dtype:
            flat = flat.to(dtype)
        adapter = self._one
        if self._masked and self._adapters is not None:
            adapter = self._adapters.masked(len(flat))
        wanted, leading = compute_dtype(inputs), inputs.shape[:-1]
        products = [product.view(*leading, product.shape[1]) for product in self.frozen.products(flat, adapter)]
        return products if dtype == wanted else [product.to(wanted) for product in products]


class _Adapters:
    """The adapters of linears that read one tensor, one below the other."""

    def __init__(self, stacked: StackedAdapter, owners: Sequence[Sequence[int]], mask: _Mask) -> None:
        self._stacked, self._owners, self._mask = stacked, owners, mask

    def masked(self, tokens: int) -> StackedAdapter:
        """All, with a mask for so many tokens."""
        return self._stacked._replace(mask=self._mask.of(tokens))

    def of(self, number: int) -> StackedAdapter | None:
        """One of them alone; None if it is not on these linears."""
        kept = [[place for place, owner in enumerate(owners) if owner == number] for owners in self._owners]
        flat = [owner == number for owners in self._owners for owner in owners]
        if all(flat):
            return self._stacked
        if not any(flat):
            return None
        ups = tuple(_laid_out(up[:, places]) for up, places in zip(self._stacked.ups, kept, strict=True))
        return StackedAdapter(_laid_out(self._stacked.down[torch.tensor(flat)]), ups)


def _groups(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Linears by their paths: those that read one tensor together, other packed or adapted ones alone."""
    taken = set[str]()
    for members in _readers(model):
        found = {path: module for path, module in members.items() if not _is_pefts(module)}
        taken |= found.keys()
        if found:
            yield found
    for path, module in list(model.named_modules()):
        parent = path.rpartition(".")[0]
        inner = any(isinstance(outer, BaseTunerLayer) for outer in (_module_at(model, parent),))
        if path not in taken and isinstance(module, FusedLora | PackedLinear) and not inner and not _is_pefts(module):
            yield {path: module}


def _readers(model: nn.Module) -> list[Mapping[str, nn.Module]]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    try:
        facts = facts_of(config, name=type(model).__name__)
    except ModelError:  # a family whose shapes are not known: its linears compute alone
        return []
    return list(readers_of_one_tensor(model, facts, (FusedLora, nn.Linear)).values())


def _module_at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def _is_pefts(module: nn.Module) -> bool:
    """Whether PEFT computes an adapter in a way that is its own."""
    if not isinstance(module, FusedLora):
        return False
    return bool(module.merged) or any(module.lora_bias.values()) or not module.is_low_rank()


def _frozen_of(module: nn.Module) -> nn.Linear:
    layer: Any = module.get_base_layer() if isinstance(module, FusedLora) else module
    assert isinstance(layer, nn.Linear)
    return layer


def _gains(module: nn.Module) -> bool:
    """Whether a linear that reads its tensor alone is better off replaced: torch multiplies others as fast."""
    return isinstance(module, FusedLora | PackedLinear)


def _why_one_adapter(model: nn.Module) -> str:
    """Why adapters of a model cannot differ by row, as a phrase."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"PEFT computes {path.rpartition('.')[2]}, with rows or weights of the adapter's own"
        if isinstance(module, BaseTunerLayer) and (not isinstance(module, FusedLora) or _is_pefts(module)):
            return f"PEFT computes the adapter of {path.removeprefix('base_model.model.')}"
    return ""


def _replace(model: nn.Module, members: Mapping[str, nn.Module], choice: AdapterChoice, form: Form) -> None:
    """Put answering linears in the place of linears that read one tensor."""
    layers = [_frozen_of(module) for module in members.values()]
    group = _Group(form.frozen(layers), len(layers), _adapters_of(list(members.values()), layers, choice))
    choice.add(group)
    for index, (path, layer) in enumerate(zip(members, layers, strict=True)):
        model.set_submodule(path, AnsweringLinear(layer, group, index))


def _adapters_of(modules: Sequence[nn.Module], layers: Sequence[nn.Linear], choice: AdapterChoice) -> _Adapters | None:
    """The adapters of linears that read one tensor; None if there are none."""
    dtype, device = dtype_of(layers[0]), _place_of(layers[0])
    downs, ups, owners = list[torch.Tensor](), list[torch.Tensor](), list[list[int]]()
    for module, layer in zip(modules, layers, strict=True):
        numbers, own = list[int](), [torch.empty((layer.out_features, 0), dtype=dtype, device=device)]
        for number, name in enumerate(choice.names, 1):
            if isinstance(module, FusedLora) and name in module.lora_A:
                down, up = _factors(module, name)
                downs.append(down.to(device, dtype))
                own.append(up.to(device, dtype))
                numbers += [number] * len(down)
        ups.append(torch.cat(own, dim=1))
        owners.append(numbers)
    if not downs:
        return None
    mask = choice.mask_of([owner for each in owners for owner in each], dtype, device)
    return _Adapters(StackedAdapter(_laid_out(torch.cat(downs)), tuple(map(_laid_out, ups))), owners, mask)


def _laid_out(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in the order of memory in which it multiplies a few tokens fastest: on a CPU by columns."""
    return matrix.contiguous() if matrix.is_cuda else matrix.t().contiguous().t()


def _factors(module: FusedLora, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] with the scaling; a column of A that pooled inputs share is written for each."""
    down, up = (factor.detach().float() for factor in module.factors(name))
    pool = module.in_features // down.shape[1]
    wide = down if pool == 1 else down.repeat_interleave(pool, dim=1) / pool
    return wide, up * module.reader(name).scaling


def _place_of(layer: nn.Linear) -> torch.device:
    """Where a linear computes."""
    place: torch.device = layer.runs_on if is_offloaded(layer) else layer.weight.device
    return place
