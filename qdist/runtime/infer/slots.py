"""Where are the keys and values of the answers at work, each answer in a row of its own?"""

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qdist.runtime.kernels.decode_attention import write_kv


class Prefill(NamedTuple):
    """A pass over whole prompts, which are padded on the right."""

    rows: torch.Tensor
    """The row of each prompt, int64 [prompts]."""


class Step(NamedTuple):
    """A pass over one token of each of the first rows."""

    places: torch.Tensor
    """Where each row's token goes, int64 [rows]."""
    longest: int
    """Tokens of the longest row afterwards, or more: as many positions are read."""


class Turn:
    """What the pass at hand is, for all layers."""

    def __init__(self) -> None:
        self.now: Prefill | Step = Prefill(torch.zeros(0, dtype=torch.int64))


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, kv_heads, positions, head_dim], on the layer's device.

    Zeros at first, so that a row which holds nothing is read harmlessly.
    """

    def __init__(self, slots: int, positions: int, turn: Turn) -> None:
        super().__init__()
        self._slots, self._positions, self._turn = slots, positions, turn
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate, once the model has said what its heads are like."""
        self.keys, self.values = (
            each.new_zeros((self._slots, each.shape[1], self._positions, each.shape[-1]))
            for each in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values of a pass; returns those that its attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self._turn.now
        if isinstance(now, Prefill):
            rows, width = now.rows.to(key_states.device), key_states.shape[2]
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                kept[:, :, :width].index_copy_(0, rows, new)
            return key_states, value_states
        if key_states.is_cuda and key_states.shape == value_states.shape:
            write_kv(key_states, value_states, self.keys, self.values, now.places.to(key_states.device))
        else:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                places = now.places.to(new.device).view(-1, 1, 1, 1).expand(new.shape)
                kept[: len(new)].scatter_(2, places, new)
        keys, values = (kept[: len(key_states), :, : now.longest] for kept in (self.keys, self.values))
        return keys, values

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a row over another."""
        for kept in (self.keys, self.values):
            kept[target, :, :tokens] = kept[source, :, :tokens]

    def clear(self, row: int) -> None:
        """Fill a row with zeros."""
        for kept in (self.keys, self.values):
            kept[row].zero_()

    def get_seq_length(self) -> int:
        """Tokens before the pass, of the longest row."""
        now = self._turn.now
        return now.longest - 1 if isinstance(now, Step) else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that attention reads, the first one's place)."""
        now = self._turn.now
        return (now.longest if isinstance(now, Step) else query_length), 0

    def get_max_length(self) -> int:
        """Tokens of a row, at most."""
        return self._positions


class Slots(Cache):
    """The cache of a model that answers: `turn` says what the next pass is.

    slots: rows. positions: tokens of a row. Memory is allocated in the first pass, by each layer.
    """

    def __init__(self, slots: int, positions: int) -> None:
        self.turn = Turn()
        super().__init__(layer_class_to_replicate=partial(SlotLayer, slots, positions, self.turn))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """What `qdist.runtime.infer.attention.mask_of_rows` is told of a pass.

        Of a step the keys that each row's token sees, int64 [rows]; of a prefill 0.
        """
        now = self.turn.now
        return now.places + 1 if isinstance(now, Step) else 0

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a row over another, in every layer."""
        for layer in self._filled():
            layer.move(source, target, tokens)

    def clear(self, row: int) -> None:
        """Fill a row with zeros, in every layer."""
        for layer in self._filled():
            layer.clear(row)

    def _filled(self) -> list[SlotLayer]:
        """The layers that have memory."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer) and layer.is_initialized]

    @property
    def size_bytes(self) -> int:
        """Memory of keys and values that is allocated."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._filled())
