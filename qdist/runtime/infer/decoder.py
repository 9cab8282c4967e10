"""How does a model bring many answers one token on, each in a row of one cache?

A step has the same tensors and shapes every time, so on a GPU it is one CUDA graph for each number of rows; nothing in
it waits for the GPU, and no Python runs for a layer.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qdist.core.errors import DataError, ModelError, SpecError
from qdist.runtime.engine.graphs import Capture, NewPool, pool_of_graphs, try_to_capture
from qdist.runtime.infer.attention import UndecodableError, attention_by_rows, configurations_of
from qdist.runtime.infer.slots import Prefill, Slots, Step
from qdist.runtime.model.packed import is_offloaded
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.placements.liger import take_liger

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits float32 [n, vocabulary], the rows that they are of, int64 [n]) -> the next tokens, int64 [n].

In a step it is captured; there may be rows among them that hold no answer, and whose token nobody reads."""
Assign = Callable[[torch.Tensor], None]
"""Is told before a pass of which row each of its tokens is, int64 [tokens]. In a step it is captured."""
PREFILL_TOKENS = 8192
"""Tokens of prompts in one pass, at most, padding among them; a longer prompt has one for itself."""
_WIDTH_MULTIPLE = 64
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_OF_A_CLASS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a class of transformers raises that cannot use these rows: of its own cache, its masks or its arguments."""
_TRIED = 4


class Decoder:
    """A model with a cache of `slots` rows: answers at work are the first rows, without a gap.

    model: of transformers, with or without PEFT around it, for which `why_not` is empty. One decoder at a time.
    positions: tokens of a prompt and its answer, at most. choose: what makes tokens of logits.
    variant: what `choose` computes at present; steps are captured for each variant. assign: see `Assign`.
    graphs: whether steps are captured; None for where they can be. new_pool: makes the pool that they are captured in.

    Raises SpecError for graphs that cannot be.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        positions: int,
        choose: Choose,
        variant: Callable[[], Hashable] = bool,
        assign: Assign | None = None,
        graphs: bool | None = None,
        new_pool: NewPool | None = None,
    ) -> None:
        self._model, self._choose, self._variant, self._assign = _base_of(model), choose, variant, assign
        self.slots, self.positions = slots, max(positions, 2)
        self.device: torch.device = model.device
        if self.device.type == "cuda" and find_spec("liger_kernel"):
            take_liger(self._model)  # as in training: their numbers are those that the adapter has learnt with
        self._configurations, self._rotaries = configurations_of(self._model), _long_rotaries(self._model)
        self.cache = Slots(slots, self.positions)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)
        """The token of each row that is not in the cache yet, int64 [slots]."""
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)
        """Tokens of each row that are in the cache, int64 [slots]."""
        self._order = torch.arange(slots, device=self.device)
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._held = [0] * slots
        self._new_pool = new_pool or partial(pool_of_graphs, self.device)
        self._capture: Capture | None = None
        self._replays: dict[tuple[int, Hashable], Callable[[], None]] = {}
        self._launched: set[tuple[int, Hashable]] = set()
        self.refused = "not asked for" if graphs is False else _why_no_graph(self._model, new_pool)
        """Why steps are not captured, as a phrase; empty while they are."""
        self.refused_variants: dict[Hashable, str] = {}
        """The same of variants that cannot be captured where others can."""
        if graphs and self.refused:
            raise SpecError(f"steps cannot be captured: {self.refused}", try_="graphs=None")

    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate, compile and capture all that steps of the present variant need, while no answer is at work."""
        self.prefill([[0]], [0])
        self._held[0] = 0
        self._count.zero_()
        for bucket in sorted({self._bucket(rows) for rows in range(1, self.slots + 1)}, reverse=True):
            if not self.refused:
                self._run(bucket)
                self._run(bucket)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Fill rows with prompts, and choose the first token of each answer.

        Raises DataError for a prompt that leaves no position for an answer.
        """
        longest = max(map(len, prompts))
        if longest >= self.positions:
            raise DataError(
                f"a prompt has {longest:,} tokens, and there are {self.positions:,} positions for it and its answer",
                try_="a shorter prompt",
            )
        for group in self._groups([len(prompt) for prompt in prompts]):
            self._prefill([prompts[index] for index in group], [rows[index] for index in group])

    @torch.no_grad()
    def step(self, rows: int) -> None:
        """Bring the first rows one token on: `tokens` go into the cache, and what follows them is the new `tokens`.

        A row whose positions are all taken stays harmless: its last token is written over.
        """
        self._count.fill_(rows)
        self._run(self._bucket(rows))
        self._held[:rows] = [min(tokens + 1, self.positions) for tokens in self._held[:rows]]

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Copy a row over another: the last one takes the place of one that ended."""
        self.cache.move(source, target, self._held[source])
        for values in (self.tokens, self.lengths):
            values[target] = values[source]
        self._held[target] = self._held[source]

    def clear(self, row: int) -> None:
        """Forget what a row held: a NaN in its keys or values would count beyond the end of the next answer in it."""
        self.cache.clear(row)
        self._held[row] = 0

    def _bucket(self, rows: int) -> int:
        """Rows of the step that computes so many: on a CPU no more, else as there are graphs."""
        return rows if self._is_exact else min(1 << (rows - 1).bit_length(), self.slots)

    @property
    def _is_exact(self) -> bool:
        return self.device.type == "cpu" and bool(self.refused)

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Which prompts share a pass: those of like lengths; on a CPU each has its own, so that it has no company."""
        group: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            width = self._width(lengths[group[0]]) if group else 0
            is_like = 2 * self._width(lengths[index]) >= width and (len(group) + 1) * width <= PREFILL_TOKENS
            if group and (self._is_exact or not is_like):
                yield group
                group = []
            group.append(index)
        yield group

    def _width(self, longest: int) -> int:
        return longest if self._is_exact else min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, self.positions)

    def _prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        lengths = [len(prompt) for prompt in prompts]
        width = self._width(max(lengths))
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        ids, where, counts = (torch.tensor(each).to(self.device) for each in (padded, list(rows), lengths))
        self.cache.turn.now = Prefill(where)
        positions = torch.arange(width, device=self.device).expand(len(prompts), -1)
        if self._assign:
            self._assign(where.repeat_interleave(width))
        logits = self._logits(ids, positions, counts - 1)
        self.lengths[where] = counts
        self.tokens[where] = self._choose(logits, where)
        for row, length in zip(rows, lengths, strict=True):
            self._held[row] = length

    def _run(self, bucket: int) -> None:
        """A step of so many rows: launched the first time, when things compile and allocate, then captured."""
        key = (bucket, self._variant())
        refused = self.refused or self.refused_variants.get(key[1])
        if not refused and key in self._launched and key not in self._replays:
            self._try_to_capture(key)
        if key in self._replays:
            self._replays[key]()
        else:
            self._pass(bucket)
            self._launched.add(key)

    def _try_to_capture(self, key: tuple[int, Hashable]) -> None:
        """Capture a step, or note why not: of this variant alone if there are graphs of others."""
        self._capture = self._capture or self._new_pool()
        try:
            found = try_to_capture(self._capture, lambda _: self._pass(key[0]), {})
        except torch.OutOfMemoryError:
            if not self._replays:
                raise
            found = "there is no memory for another graph"
        if not isinstance(found, str):
            self._replays[key] = found[0]
            return
        self._capture = None  # CUDA records no more into a pool in which a capture has failed
        if self._replays:
            self.refused_variants[key[1]] = found
        else:
            self.refused = found

    def _pass(self, bucket: int) -> torch.Tensor:
        """One token of the first rows, of which those from `_count` on hold nothing."""
        rows, lengths = self._order[:bucket], self.lengths[:bucket]
        holds = rows < self._count
        places = torch.where(holds, lengths.clamp(max=self.positions - 1), 0)
        longest = min(max(self._held[:bucket]) + 1, self.positions) if self._is_exact else self.positions
        self.cache.turn.now = Step(places, max(longest, 2))
        if self._assign:
            self._assign(rows)
        logits = self._logits(self.tokens[:bucket, None], places[:, None], torch.zeros_like(rows))
        lengths.copy_(torch.where(holds, places + 1, lengths))
        chosen: torch.Tensor = self.tokens[:bucket].copy_(self._choose(logits, rows))
        return chosen

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] of one token of each row. last: its index among the row's `ids`."""
        with (
            attention_by_rows(self._configurations),
            _with_short_factors(self._rotaries),
            _only(self._model, last, ids.shape[1]),
        ):
            outputs = self._model(
                input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, return_dict=True
            )
        return _picked(outputs.logits, last)[:, 0].to(self.device, torch.float32)


def why_not(model: Any, *, positions: int | None = None) -> str:
    """Why a model cannot be decoded by rows, as a phrase; empty if it can. Tries it on two tokens.

    positions: tokens of a prompt and its answer, at most; None for as many as the model has.
    """
    base = _base_of(model)
    if reason := _other_layers(base) or _moving_rotary(base, positions):
        return reason
    decoder = Decoder(model, slots=1, positions=_TRIED, choose=lambda logits, _: logits.argmax(-1), graphs=False)
    try:
        decoder.prefill([[0]], [0])
        decoder.step(1)
    except torch.OutOfMemoryError:
        raise
    except UndecodableError as error:
        return error.message
    except _OF_A_CLASS as error:
        return f"{type(base).__name__} has a cache of its own ({str(error).partition(chr(10))[0]})"
    return _apart(base)


def _apart(base: Any) -> str:
    """Which layer did not compute its attention by rows in the step that was tried."""
    try:
        layers = decoder_layers(base)
    except ModelError as error:
        return error.message
    for index, layer in enumerate(layers):
        if not any(getattr(module, "attends_by_rows", False) for module in layer.modules()):
            return f"layer {index}, {type(layer).__name__}, computes its attention itself"
    return ""


def _other_layers(base: Any) -> str:
    """Which layers a model has that keep something else than keys and values of their own."""
    config = base.config.get_text_config(decoder=True)
    if "position_ids" not in inspect.signature(inspect.unwrap(type(base).forward)).parameters:
        return f"{type(base).__name__} takes no positions"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        return f"it has layers of {' and '.join(others)}"
    return ""


def _moving_rotary(base: Any, positions: int | None) -> str:
    """Whether rotary frequencies change as texts grow: keys in the cache would be of others."""
    for module in base.modules():
        kinds = getattr(module, "rope_type", "")
        kinds = {kinds} if isinstance(kinds, str) else set(kinds.values())
        if any("dynamic" in kind for kind in kinds) or ("longrope" in kinds and len(kinds) > 1):
            return "its rotary frequencies depend on the longest row"
    for module in _long_rotaries(base):
        short: int = module.config.rope_parameters["original_max_position_embeddings"]
        if positions is None or positions > short:
            return f"its rotary frequencies change after {short:,} tokens"
    return ""


def _long_rotaries(base: Any) -> list[Any]:
    """Modules that have other rotary frequencies for long texts (`longrope`)."""
    return [module for module in base.modules() if getattr(module, "rope_type", None) == "longrope"]


@contextmanager
def _with_short_factors(rotaries: Sequence[Any]) -> Iterator[None]:
    """Have `longrope` not look at positions, which a graph cannot: all of them are those of short texts."""
    for module in rotaries:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module in rotaries:
            module.rope_type = "longrope"


def _why_no_graph(base: Any, new_pool: NewPool | None) -> str:
    if new_pool is not None:
        return ""
    places = {parameter.device for parameter in base.parameters()}
    if any(is_offloaded(module) for module in base.modules()):
        return "layers are offloaded to host memory"
    if len(places) > 1:
        return f"the model is spread over {len(places)} devices"
    return "" if {place.type for place in places} == {"cuda"} else "there is no CUDA"


def _base_of(model: Any) -> Any:
    """The model of transformers in a model of PEFT."""
    return getattr(model, "get_base_model", lambda: model)()


@contextmanager
def _only(model: Any, last: torch.Tensor, width: int) -> Iterator[None]:
    """Have the head compute the logits of one token of each row: of 2,048 they are the most of a prefill's memory."""
    head = model.get_output_embeddings()
    if head is None or width == 1:
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        return (_picked(hidden, last), *inputs[1:]) if hidden.shape[:2] == (len(last), width) else None

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _picked(values: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Of [rows, width, ...] what is at one place of each row, [rows, 1, ...]; as it is where that is all there is."""
    if values.shape[1] == 1:
        return values
    return values[torch.arange(len(last), device=values.device), last.to(values.device)][:, None]
