"""What is a weight of the merged model? The frozen one plus what adapters add to it, rounded once."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.runtime.exports.backbone import Backbone, Weight
from qdist.runtime.exports.update import Adapters, Update

_ROWS = 1024
"""Of a matrix that are in float32 at a time."""


class Merged:
    """The weights of a backbone with adapters merged into it, computed when they are asked for."""

    def __init__(self, backbone: Backbone, adapters: Adapters, dtype: torch.dtype) -> None:
        """dtype: bfloat16 or float16."""
        self.backbone, self.adapters, self.dtype = backbone, adapters, dtype

    def weights(self) -> tuple[Weight, ...]:
        """All of them; a tied table is there once."""
        return self.backbone.weights()

    def read(self, name: str) -> torch.Tensor:
        """A weight, rounded to `dtype`. Raises ModelError where it holds no such number."""
        path, _, leaf = name.rpartition(".")
        update = self.adapters.of(path) if leaf == "weight" and path in self.adapters.paths else None
        frozen = self.backbone.read(name)
        merged = torch.empty(frozen.shape, dtype=self.dtype, device=frozen.device)
        for first in range(0, len(frozen), _ROWS):
            rows = frozen[first : first + _ROWS].float()
            if update is not None:
                rows = rows + _rows(update, first, rows.device)
            _require_range(rows, name, self.dtype)
            merged[first : first + _ROWS] = rows
        trained = self.adapters.rows(path) if leaf == "weight" else None
        if trained is not None:
            _require_range(trained, name, self.dtype)
            merged[list(self.backbone.source.new_token_ids)] = trained.to(merged.device, self.dtype)
        return merged

    def of(self, path: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
        """As other sources of weights have it, for `skeleton.fill`."""
        return _OfModule(self, path, [name for name, _ in module.named_parameters(recurse=False)])

    def check(self) -> None:
        """Each weight is held against what was written as it is read."""
        self.backbone.check()


class _OfModule(Mapping[str, torch.Tensor]):
    """The tensors of one module by their names in it, computed on use."""

    def __init__(self, merged: Merged, path: str, names: list[str]) -> None:
        self._merged, self._path, self._names = merged, path, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._merged.read(f"{self._path}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rows(update: Update, first: int, device: torch.device) -> torch.Tensor:
    """What is added to `_ROWS` rows, float32."""
    terms = [
        term._replace(up=term.up[first : first + _ROWS].to(device), down=term.down.to(device)) for term in update.terms
    ]
    return Update(tuple(terms)).dense()


def _require_range(values: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Refuse what would be infinite once rounded."""
    if dtype != torch.float16:
        return  # bfloat16 holds what float32 holds
    low, high = (float(end) for end in values.aminmax())
    largest = torch.finfo(dtype).max
    if max(-low, high) > largest:
        raise ModelError(
            f"{name} reaches {max(-low, high):.3g} once merged; float16 ends at {largest:,.0f}", try_="--dtype bfloat16"
        )
