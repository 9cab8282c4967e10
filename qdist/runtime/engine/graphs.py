"""Forward and backward of a micro-batch as one CUDA graph, captured once a shape and replayed.

Python launches some 160 kernels a layer; a small micro-batch leaves the GPU waiting for them. A graph launches them all
at once. Gradients are added up in place, so they must be there before the capture and stay where they are.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, torch.Tensor]
Passes = Callable[[Batch], torch.Tensor]
"""Forward and backward of a micro-batch; returns its summed loss, detached, a scalar on the device."""
Capture = Callable[[Passes, Batch], tuple[Callable[[], None], torch.Tensor]]
"""Records passes over a batch without running them: (runs them again, the loss that they leave)."""
NewPool = Callable[[], Capture]
"""Begins a pool of memory, in which all captures are until the next one: no two replays run at a time."""
HasRoom = Callable[[float], bool]
"""Whether launched passes that need so many times the memory of the largest so far fit beside a pool."""
MOST = 24
"""Shapes to capture. Each graph of a 7B takes some 0.1 GiB and half a second."""
_Key = tuple[tuple[str, tuple[int, ...]], ...]


class _Captured(NamedTuple):
    replay: Callable[[], None]
    inputs: Batch
    loss: torch.Tensor


class Replayed:
    """Runs the passes of micro-batches, replaying those of shapes that it has captured.

    A shape's first micro-batch is launched kernel by kernel: whatever compiles or allocates once does it then. Nothing
    is captured before `start`: a replay calls no hook. The largest shape is captured first, and the others find room in
    its memory; where a larger one comes later, all are captured anew. Launched passes find none in it: where there is
    too little besides, the captured ones are given up for them.

    passes: reads only tensors on the device that are the same objects every time, beside its argument.
    """

    def __init__(
        self, passes: Passes, device: torch.device, new_pool: NewPool | None = None, has_room: HasRoom | None = None
    ) -> None:
        self._passes, self._device = passes, device
        self._new_pool = new_pool or partial(pool_of_graphs, device)
        self._has_room = has_room or partial(has_room_for, device)
        self._capture: Capture | None = None
        self._captured: dict[_Key, _Captured] = {}
        self._seen: set[_Key] = set()
        self._started = False
        self.refused = ""
        """Why shapes are captured no more, as a sentence; empty while they are."""

    def start(self) -> None:
        """Capture from now on."""
        self._started = True

    def make_room(self, times: float = 1.0) -> None:
        """Before passes are launched: give up the pool if they do not fit beside it.

        times: the memory that they need, over that of the largest passes so far.
        """
        if self._captured and not self._has_room(times):
            self.release()

    def release(self) -> None:
        """Give the memory of all graphs back, for work that is not in one; passes are captured anew when they come."""
        self._captured.clear()
        self._capture = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a micro-batch, a float64 scalar; its gradients are added to those that are there."""
        key = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))
        if key not in self._captured and self._started and key in self._seen and not self.refused:
            self._try_to_capture(key, batch)
        if (own := self._captured.get(key)) is None:
            if key not in self._seen:
                self.make_room(_elements(key)[0] / max((_elements(each)[0] for each in self._seen), default=1))
            self._seen.add(key)
            return self._passes(self._moved(batch)).double()
        for name, place in own.inputs.items():
            place.copy_(_pinned(batch[name], self._device), non_blocking=True)
        own.replay()
        return own.loss.double()  # a copy: the next replay writes over it

    def _try_to_capture(self, key: _Key, batch: Batch) -> None:
        if len(self._captured) >= MOST:
            self._refuse(f"micro-batches have more than {MOST} shapes")
            return
        if self._capture is None or _elements(key) > max(map(_elements, self._captured), default=(0,)):
            self._captured.clear()
            self._capture = self._new_pool()
        inputs = {name: value.clone() for name, value in self._moved(batch).items()}
        found = try_to_capture(self._capture, self._passes, inputs)
        if isinstance(found, str):
            self._refuse(found)
            return
        self._captured[key] = _Captured(found[0], inputs, found[1])

    def _refuse(self, reason: str) -> None:
        """Capture no more. What is captured stays if there is room for launched passes beside it."""
        self.refused = reason
        self.make_room()

    def _moved(self, batch: Batch) -> Batch:
        return {name: _pinned(value, self._device).to(self._device, non_blocking=True) for name, value in batch.items()}


class ReplayedWork:
    """Work on the device without arguments, captured the second time that it is done and replayed from then on.

    The first time it may allocate what it keeps.
    """

    def __init__(self, work: Callable[[], None], device: torch.device, new_pool: NewPool | None = None) -> None:
        self._work, self._new_pool = work, new_pool or partial(pool_of_graphs, device)
        self._times = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        self._times += 1
        if self._times == 1:
            self._work()
            return
        if self._replay is None:
            self._replay, _ = self._new_pool()(self._passes, {})
        self._replay()

    def _passes(self, batch: Batch) -> torch.Tensor:
        self._work()
        return torch.empty(0)


def try_to_capture(capture: Capture, passes: Passes, inputs: Batch) -> tuple[Callable[[], None], torch.Tensor] | str:
    """What `capture` returns of passes; or what CUDA forbids of them in a capture, where nothing of them has run.

    Raises torch.OutOfMemoryError.
    """
    try:
        return capture(passes, inputs)
    except RuntimeError as error:
        # No name for the first one: it would keep this frame and all that the passes had made.
        if isinstance(_first_of(error), torch.OutOfMemoryError):
            raise _first_of(error) from None
        return str(_first_of(error)).partition("\n")[0]


def pool_of_graphs(device: torch.device) -> Capture:
    """A pool for CUDA graphs: nothing in it outlives a replay but the losses."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what passes without a graph have left is not in the pool, nor is an older one
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(passes: Passes, inputs: Batch) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL and of the heartbeat go on meanwhile.
        captured = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        before = torch.cuda.current_stream(device)
        try:
            with ConstantsOnDevice(), captured:
                loss = passes(inputs)
        finally:
            torch.cuda.set_stream(before)  # torch 2.13 stays on the other one when the end of a capture fails
        return graph.replay, loss

    return capture


def never_room(_: float) -> bool:
    """For ranks that must do alike: one that has room gives its graphs up with one that has not."""
    return False


def has_room_for(device: torch.device, times: float) -> bool:
    """Whether there is room outside all pools for passes that need `times` the memory of the largest so far."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_reserved(device)
    needed = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return needed * times <= min(free, allowed)


class ConstantsOnDevice(TorchFunctionMode):
    """Has the GPU itself write `torch.tensor(number, device=...)`: a graph cannot hold a copy of pageable memory.

    transformers' written-out masks and ALiBi are made of such constants.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if (
            func is torch.tensor
            and len(args) == 1
            and "device" in named
            and torch.device(named["device"]).type != "cpu"
        ):
            return _written(args[0], named)
        return func(*args, **named)


def _written(data: Any, named: Mapping[str, Any]) -> torch.Tensor:
    if isinstance(data, int | float):
        return torch.full((), data, **named)
    if isinstance(data, list | tuple) and data:
        return torch.stack([_written(each, named) for each in data])
    return torch.tensor(data, **named)


def _first_of(error: RuntimeError) -> RuntimeError:
    """The error that others came of: the end of a failed capture fails too, and does not say why."""
    first, before = error, error.__context__
    while before is not None:
        first, before = before if isinstance(before, RuntimeError) else first, before.__context__
    return first


def _elements(key: _Key) -> tuple[int, ...]:
    """Sizes of a shape's tensors, the rows of tokens first: of two shapes the larger needs more memory."""
    sizes = {name: math.prod(shape) for name, shape in key}
    return sizes.pop("input_ids", 0), sum(sizes.values())


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from pageable memory would wait for the GPU."""
    return values.pin_memory() if device.type == "cuda" and not (values.is_cuda or values.is_pinned()) else values
