"""What goes through a model while it is quantized: pieces of text, their hidden states, the Hessians of linears.

Samples are spread over devices, each with a copy of the decoder layer at hand.
"""

import copy
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qdist.core.errors import DataError
from qdist.runtime.data import read_conversations
from qdist.runtime.encode import encode
from qdist.runtime.gptq.decoder import Start, moved

T = TypeVar("T")
_TEXT_PIECE = 1 << 20
"""Characters of plain text that are tokenized at a time, up to the end of a line."""


def pieces(source: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Calibration samples, int64 [samples, seq_len]: pieces of the source's tokens laid end to end, drawn by a seed.

    source: a `.txt` file, or whatever `launch --data` takes.
    Raises DataError where it holds too few tokens.
    """
    read = _text_tokens if Path(source).suffix.lower() == ".txt" else _record_tokens
    tokens = array("q")
    for part in read(source, tokenizer):
        tokens.extend(part)
    there = len(tokens) // seq_len
    if there < samples:
        raise DataError(
            f"{source} has {len(tokens)} tokens, which make {there} samples of {seq_len} tokens; {samples} are wanted",
            try_=f"--samples {there}" if there else f"more data, or --seq-len {max(1, len(tokens) // samples)}",
        )
    chosen = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return torch.frombuffer(tokens, dtype=torch.int64)[: there * seq_len].reshape(there, seq_len)[chosen]


def _record_tokens(source: str, tokenizer: Any) -> Iterator[list[int]]:
    return (encode(conversation, tokenizer).tokens for conversation in read_conversations(source))


def _text_tokens(source: str, tokenizer: Any) -> Iterator[list[int]]:
    try:
        with open(source, encoding="utf-8") as file:
            while lines := file.readlines(_TEXT_PIECE):
                yield tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    except FileNotFoundError:
        raise DataError(f"{source} does not exist", try_="--data FILE") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason}", try_="iconv -t UTF-8") from error


class Calibration:
    """Hidden states of all samples in front of one decoder layer after another.

    They wait on the CPU, or on the device that runs them where they take no more than an eighth of its free memory:
    copying them five times a layer takes longer than many layers do.
    """

    def __init__(self, start: Start, devices: tuple[torch.device, ...]) -> None:
        self.devices = devices
        self._hidden, self._arguments = start.hidden, start.arguments
        self._homes = [_home(device, sum(start.hidden[index].nbytes for index in self._of(worker)))
                       for worker, device in enumerate(devices)]  # fmt: skip
        for worker, home in enumerate(self._homes):
            for index in self._of(worker):
                self._hidden[index] = self._hidden[index].to(home)
        self._position, self._layers, self._given = 0, list[nn.Module](), list[dict[str, Any]]()

    def enter(self, layer: nn.Module) -> None:
        """Take the next decoder layer, which lies on the first device, and copy it to the others."""
        self._layers = [layer, *(copy.deepcopy(layer).to(device) for device in self.devices[1:])]
        self._given = [moved(self._arguments[self._position], device) for device in self.devices]

    def hessian(self, path: str) -> torch.Tensor:
        """2 X X^T / n over the n tokens that reach a linear of the layer, float32 [in, in] on the first device."""
        tokens = sum(hidden.shape[1] for hidden in self._hidden)
        parts = self._on_each(lambda worker: self._part(worker, path, 2 / tokens))
        total = parts[0]
        for part in parts[1:]:
            total += part.to(total.device)
        return total

    def replace(self, path: str, weight: torch.Tensor) -> None:
        """Give a linear of the layer other weights, [out, in]."""
        for layer in self._layers:
            linear = layer.get_submodule(path)
            # Not written in place: on a CPU the old weights may be the source's own memory.
            linear.weight = nn.Parameter(weight.to(linear.weight).contiguous(), requires_grad=False)

    def leave(self) -> None:
        """Carry the hidden states through the layer, and drop it."""
        self._on_each(self._advance)
        self._position, self._layers, self._given = self._position + 1, [], []

    def _on_each(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.devices)) as pool:
            return list(pool.map(work, range(len(self.devices))))

    def _of(self, worker: int) -> range:
        """The samples of a device."""
        return range(worker, len(self._hidden), len(self.devices))

    @torch.no_grad()  # a setting of the thread, not of the process
    def _part(self, worker: int, path: str, factor: float) -> torch.Tensor:
        linear = self._layers[worker].get_submodule(path)
        total = torch.zeros(linear.in_features, linear.in_features, device=self.devices[worker])

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            add_products(total, inputs[0].reshape(-1, total.shape[0]), factor)
            raise _Reached  # what follows in the layer is not needed yet

        with linear.register_forward_pre_hook(add):
            for index in self._of(worker):
                try:
                    self._run(worker, index)
                except _Reached:
                    continue
        return total

    @torch.no_grad()
    def _advance(self, worker: int) -> None:
        for index in self._of(worker):
            self._hidden[index] = self._run(worker, index).to(self._homes[worker])

    def _run(self, worker: int, index: int) -> torch.Tensor:
        hidden = self._hidden[index].to(self.devices[worker])
        output = self._layers[worker](hidden, **self._given[worker])
        return output[0] if isinstance(output, tuple) else output


def _home(device: torch.device, size: int) -> torch.device:
    """Where so many bytes of hidden states wait."""
    if device.type == "cuda" and 8 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def add_products(total: torch.Tensor, rows: torch.Tensor, factor: float) -> None:
    """total += factor X^T X, in float32. Products of 16-bit numbers are exact there, also on a GPU's matrix units."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(rows.t(), rows, out_dtype=torch.float32), alpha=factor)
    else:
        rows = rows.to(torch.float32)
        total.addmm_(rows.t(), rows, alpha=factor)


class _Reached(Exception):
    """The linear whose inputs are wanted has them."""
