"""Weights that are unpacked ahead: whose, when, and into which of two buffers."""

from collections.abc import Callable

import torch

from qdist.runtime.model.ahead import UnpackAhead


class Layer:
    def __init__(self, name: str, value: float, log: list[str], shape: tuple[int, int] = (2, 3)) -> None:
        self.name, self.value, self.log = name, value, log
        self.out_features, self.in_features = shape

    def unpack_into(self, out: torch.Tensor) -> None:
        self.log.append(f"unpack {self.name}")
        out.fill_(self.value)


class Recording:
    """A lane that does its work at once and writes down when it was started and waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def start(self, work: Callable[[], None]) -> None:
        self.log.append("start")
        work()

    def wait(self) -> None:
        self.log.append("wait")


def made() -> tuple[list[str], UnpackAhead, Layer, Layer, Layer]:
    log: list[str] = []
    ahead = UnpackAhead(Recording(log), largest=12, dtype=torch.float32, device=torch.device("cpu"))
    return log, ahead, Layer("a", 1, log), Layer("b", 2, log, (3, 4)), Layer("c", 3, log)


def passed(ahead: UnpackAhead, *layers: Layer) -> list[float]:
    ahead.begin()
    values = []
    for layer in layers:
        matrix = ahead.take(layer)
        assert matrix.shape == (layer.out_features, layer.in_features)
        values.append(float(matrix.mean()))
    ahead.end()
    return values


def test_the_first_passes_unpack_each_when_it_is_taken() -> None:
    log, ahead, a, b, _ = made()
    assert passed(ahead, a, b, a) == [1, 2, 1]
    assert log == ["unpack a", "unpack b", "unpack a"]


def test_later_passes_unpack_the_next_beside_the_one_at_hand() -> None:
    log, ahead, a, b, c = made()
    passed(ahead, a, b, c)
    log.clear()
    assert passed(ahead, a, b, c) == [1, 2, 3]
    assert log == ["unpack a", "start", "unpack b", "wait", "start", "unpack c", "wait"]


def test_a_matrix_is_whole_until_the_next_but_one_is_taken() -> None:
    _, ahead, a, b, c = made()
    passed(ahead, a, b, c)
    ahead.begin()
    first = ahead.take(a)
    assert float(first.mean()) == 1
    second = ahead.take(b)
    assert float(second.mean()) == 2
    ahead.take(c)
    assert float(second.mean()) == 2


def test_another_order_than_before_is_right_too() -> None:
    log, ahead, a, b, c = made()
    passed(ahead, a, b, c)
    log.clear()
    assert passed(ahead, a, c, b, c) == [1, 3, 2, 3]
    assert log[:5] == ["unpack a", "start", "unpack b", "wait", "unpack c"]


def test_what_was_unpacked_for_nobody_is_waited_for() -> None:
    log, ahead, a, b, _ = made()
    passed(ahead, a, b)
    log.clear()
    passed(ahead, a)
    assert log[-1] == "wait"
