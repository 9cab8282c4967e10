"""Threads that each have a device to themselves while a model is quantized."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """A thread for each device, kept from layer to layer.

    cuDNN's plans for attention are a thread's own, and to make one takes as long as many layers of 2,048 tokens.
    """

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self.devices = devices
        # They end with the last reference to them.
        self._threads = [ThreadPoolExecutor(1) for _ in devices]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """work(worker) of all devices at once."""
        return self.spread(lambda _, worker: work(worker), len(self.devices))

    def spread(self, work: Callable[[int, int], T], count: int) -> list[T]:
        """work(number, worker) of so many numbers, dealt out to the devices in turn."""
        workers = [number % len(self.devices) for number in range(count)]
        futures: list[Future[T]] = [
            self._threads[worker].submit(work, number, worker) for number, worker in enumerate(workers)
        ]
        return [future.result() for future in futures]
