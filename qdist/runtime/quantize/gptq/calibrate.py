"""Calibration data on its way through a model being quantized: samples, hidden states, Hessians of linears."""

import copy
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError
from qdist.core.requests import GptqSettings
from qdist.core.spec.sections import Data
from qdist.host.data.files import is_plain_text
from qdist.host.data.sources import read_source, sources_of
from qdist.host.data.text import open_text
from qdist.runtime.data.encode import Encoder
from qdist.runtime.quantize.gptq.decoder import Reached, Start, moved

T = TypeVar("T")


class Workers:
    """One thread per device, kept from layer to layer.

    cuDNN's plans for attention are a thread's own, and to make one takes as long as many layers of 2,048 tokens.
    """

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self.devices = devices
        # They end with the last reference to them.
        self._threads = [ThreadPoolExecutor(1) for _ in devices]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Results of work(worker) on all devices at once."""
        return self.spread(lambda _, worker: work(worker), len(self.devices))

    def spread(self, work: Callable[[int, int], T], count: int) -> list[T]:
        """Results of work(number, worker) for `count` numbers, distributed round-robin over the devices."""
        workers = [number % len(self.devices) for number in range(count)]
        futures: list[Future[T]] = [
            self._threads[worker].submit(work, number, worker) for number, worker in enumerate(workers)
        ]
        return [future.result() for future in futures]


_COLUMNS = 1 << 11
"""Columns of a Hessian that are summed at a time, down to the diagonal: it is symmetric."""


class _Sum(NamedTuple):
    begin: int
    lanes: int
    total: torch.Tensor


class LaneSums:
    """Sums of consecutive lanes, added pairwise: lanes 0 and 1, 2 and 3, then those of 0 to 3.

    So a device adds up what it has before it hands it on, in the order in which one device would add all of it, and
    few sums are kept: the binary digits of their number.
    """

    def __init__(self) -> None:
        self._sums = list[_Sum]()

    def append(self, lane: int, total: torch.Tensor) -> None:
        """Add the sum of the next lane, taking ownership of it."""
        self._push(_Sum(lane, 1, total))

    def extend(self, others: "LaneSums") -> None:
        """Add the sums of another device, for the lanes that come next."""
        for other in others._sums:
            self._push(other)

    def total(self) -> torch.Tensor:
        """The sum over all lanes, on the device of the first lane."""
        while len(self._sums) > 1:
            self._add()
        return self._sums[0].total

    def _push(self, later: _Sum) -> None:
        self._sums.append(later)
        while len(self._sums) > 1:
            earlier, later = self._sums[-2:]
            if earlier.lanes != later.lanes or earlier.begin % (2 * later.lanes):
                break
            self._add()

    def _add(self) -> None:
        earlier, later = self._sums[-2], self._sums.pop()
        earlier.total.add_(later.total.to(earlier.total.device))
        self._sums[-1] = earlier._replace(lanes=earlier.lanes + later.lanes)


def add_products(total: torch.Tensor, rows: torch.Tensor, factor: float) -> None:
    """total += factor X^T X, in float32; what is far below the diagonal is left to `mirror`.

    Products of 16-bit numbers are exact there, also on a GPU's matrix units.
    """
    short = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    rows = rows if short else rows.to(torch.float32)
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        above, part = total[:end, start:end], rows[:, start:end]
        if short:
            above.add_(torch.mm(rows[:, :end].t(), part, out_dtype=torch.float32), alpha=factor)
        else:
            above.addmm_(rows[:, :end].t(), part, alpha=factor)


def mirror(total: torch.Tensor) -> None:
    """Fill in what `add_products` left out."""
    for start in range(_COLUMNS, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, :start] = total[:start, start:end].t()


_TEXT_PIECE = 1 << 20
"""Characters of plain text tokenized at a time, up to the end of a line."""
_FEWEST_TOKENS = 32
"""Fewest tokens per sample that an error message may suggest."""
LANES = 8
"""Parts of the samples that are summed separately, then pairwise, so that a Hessian is bit-identical on any number of
devices. Each device takes whole lanes; more devices than lanes are of no use."""
_TOKENS_AT_ONCE = 1 << 13
"""Tokens per pass through a layer. A GPU computes 2,048 tokens in little more than the launch time of its kernels, and
the threads that launch on several GPUs take turns."""


def pieces(wanted: GptqSettings, tokenizer: Any, *, seq_len: int) -> torch.Tensor:
    """Calibration samples, int64 [samples, seq_len]: random pieces of the data's concatenated tokens.

    Raises DataError if they are too few, or records cannot be used.
    """
    tokens, samples = array("q"), wanted.samples
    for part in _tokens(wanted, tokenizer):
        tokens.extend(part)
    there = len(tokens) // seq_len
    if there < samples:
        shorter = len(tokens) // samples
        more = f"more data, or --seq-len {shorter}" if shorter >= _FEWEST_TOKENS else "more data"
        raise DataError(
            f"{wanted.data} has {len(tokens)} tokens, which make {there} samples of {seq_len} tokens; {samples} are "
            "wanted",
            try_=f"--samples {there}" if there else more,
        )
    chosen = torch.randperm(there, generator=torch.Generator().manual_seed(wanted.seed))[:samples].sort().values
    return torch.frombuffer(tokens, dtype=torch.int64)[: there * seq_len].reshape(there, seq_len)[chosen]


def _tokens(wanted: GptqSettings, tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each record, or of pieces of a plain text. Raises DataError, once for all unusable records."""
    bad, total, encoder = BadRecords(), 0, Encoder(tokenizer)
    for source in sources_of(Data(path=wanted.data)):
        if source.part.count is None and is_plain_text(source.name):
            yield from _text_tokens(source.name, tokenizer)
            continue
        for conversation in read_source(source, wanted.reading, seed=wanted.seed):
            total += 1
            try:
                if isinstance(conversation, DataError):
                    raise conversation
                samples = encoder.encode(conversation).samples
            except DataError as error:
                bad.add(error)
                continue
            yield from (sample.tokens for sample in samples)
    bad.raise_any(total, allowed=wanted.skip_bad)


def _text_tokens(source: str, tokenizer: Any) -> Iterator[list[int]]:
    with open_text(Path(source).expanduser()) as file:
        while lines := file.readlines(_TEXT_PIECE):
            yield tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]


def batches(samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Samples, int64 [samples, tokens], in batches for a layer: small enough that every lane has some."""
    count, tokens = samples.shape
    return samples.split(max(1, min(_TOKENS_AT_ONCE // tokens, -(-count // LANES))))


class Calibration:
    """Hidden states of all batches in front of successive decoder layers.

    They wait on the CPU, or on the device that runs them where they take no more than an eighth of its free memory:
    copying them five times a layer takes longer than many layers do.
    """

    def __init__(self, start: Start, devices: tuple[torch.device, ...]) -> None:
        self.devices, self.workers = devices, Workers(devices)
        self._hidden, self._arguments = start.hidden, start.arguments
        self._homes = [_home(device, sum(start.hidden[index].nbytes for index in self._of(worker)))
                       for worker, device in enumerate(devices)]  # fmt: skip
        for worker, home in enumerate(self._homes):
            for index in self._of(worker):
                self._hidden[index] = self._hidden[index].to(home)
        self._position, self._layers, self._given = 0, list[nn.Module](), list[dict[int, dict[str, Any]]]()

    def enter(self, layer: nn.Module) -> None:
        """Take the next decoder layer, from the first device, and copy it to the others."""
        self._layers = [layer, *(copy.deepcopy(layer).to(device) for device in self.devices[1:])]
        self._given = [moved(self._arguments[self._position], device) for device in self.devices]

    def hessian(self, path: str) -> torch.Tensor:
        """2 X X^T / n over the n tokens that reach a linear of the layer, float32 [in, in] on the first device."""
        tokens = sum(hidden.shape[:2].numel() for hidden in self._hidden)
        first, *others = self.workers.each(lambda worker: self._sums(worker, path, 2 / tokens))
        for other in others:
            first.extend(other)
        total = first.total()
        mirror(total)
        return total

    def weight(self, path: str, worker: int) -> torch.Tensor:
        """The weights of a linear of the layer, float32 [out, in] on one of the devices."""
        weight: torch.Tensor = self._layers[worker].get_submodule(path).weight
        return weight.to(torch.float32)

    def replace(self, path: str, weight: torch.Tensor) -> None:
        """Replace the weights [out, in] of a linear of the layer."""
        for layer in self._layers:
            linear = layer.get_submodule(path)
            # Not written in place: on a CPU the old weights may be the source's own memory.
            linear.weight = nn.Parameter(weight.to(linear.weight).contiguous(), requires_grad=False)

    def leave(self) -> None:
        """Pass the hidden states through the layer, and drop it."""
        self.workers.each(self._advance)
        self._position, self._layers, self._given = self._position + 1, [], []

    def _lanes(self, worker: int) -> range:
        """The consecutive lanes of a device, starting with the first device's."""
        first, last = (-(-LANES * border // len(self.devices)) for border in (worker, worker + 1))
        return range(first, min(last, len(self._hidden)))

    def _of(self, worker: int) -> list[int]:
        """Indices of a device's batches."""
        return [index for lane in self._lanes(worker) for index in self._in(lane)]

    def _in(self, lane: int) -> range:
        return range(lane, len(self._hidden), LANES)

    @torch.no_grad()  # a setting of the thread, not of the process
    def _sums(self, worker: int, path: str, factor: float) -> LaneSums:
        """The sums over one device's lanes."""
        linear, sums = self._layers[worker].get_submodule(path), LaneSums()

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            add_products(total, inputs[0].reshape(-1, linear.in_features), factor)
            raise Reached  # what follows in the layer is not needed yet

        with linear.register_forward_pre_hook(add):
            for lane in self._lanes(worker):
                total = torch.zeros(linear.in_features, linear.in_features, device=self.devices[worker])
                for index in self._in(lane):
                    with suppress(Reached):
                        self._run(worker, index)
                sums.append(lane, total)
        return sums

    @torch.no_grad()
    def _advance(self, worker: int) -> None:
        for index in self._of(worker):
            self._hidden[index] = self._run(worker, index).to(self._homes[worker])

    def _run(self, worker: int, index: int) -> torch.Tensor:
        hidden = self._hidden[index].to(self.devices[worker])
        output = self._layers[worker](hidden, **self._given[worker][len(hidden)])
        return output[0] if isinstance(output, tuple) else output


def stays(size: int, free: int) -> bool:
    """Whether `size` bytes of hidden states stay on a GPU that has `free` bytes free."""
    return 8 * size <= free


def _home(device: torch.device, size: int) -> torch.device:
    """The device on which `size` bytes of hidden states wait."""
    if device.type == "cuda" and stays(size, torch.cuda.mem_get_info(device)[0]):
        return device
    return torch.device("cpu")
