"""When micro-batches are captured and what a replay is given; graphs themselves need a GPU (tests/gpu)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdist.runtime.engine import graphs
from qdist.runtime.engine.graphs import Batch, Capture, ConstantsOnDevice, Passes, Replayed

CPU = torch.device("cpu")


class Recorder:
    """Passes that add a batch's values to a gradient, and a capture that runs them again when replayed."""

    def __init__(self) -> None:
        self.gradient = torch.zeros(())
        self.launched: list[tuple[int, ...]] = []
        self.captured: list[tuple[int, ...]] = []
        self.fault: Exception | None = None
        self.pools = 0
        self.room = 100.0

    def passes(self, batch: Batch) -> torch.Tensor:
        self.launched.append(tuple(batch["input_ids"].shape))
        return self._computed(batch)

    def _computed(self, batch: Batch) -> torch.Tensor:
        self.gradient += batch["input_ids"].sum()
        return batch["input_ids"].sum()

    def new_pool(self) -> Capture:
        self.pools += 1
        return self.capture

    def has_room(self, times: float) -> bool:
        return times <= self.room

    def capture(self, passes: Passes, inputs: Batch) -> tuple[Callable[[], None], torch.Tensor]:
        if self.fault:
            raise self.fault
        self.captured.append(tuple(inputs["input_ids"].shape))
        loss = torch.zeros(())
        return lambda: loss.copy_(self._computed(inputs)), loss


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def replayed(recorder: Recorder) -> Replayed:
    return Replayed(recorder.passes, CPU, recorder.new_pool, recorder.has_room)


def batch(value: float, width: int = 2) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full((1, width), value)}


def test_nothing_is_captured_before_the_start(recorder: Recorder, replayed: Replayed) -> None:
    for value in (1.0, 2.0, 3.0):
        replayed(batch(value))
    assert recorder.captured == []
    assert len(recorder.launched) == 3


def test_a_shape_is_launched_once_and_then_replayed_with_new_values(recorder: Recorder, replayed: Replayed) -> None:
    replayed.start()
    losses = [float(replayed(batch(value))) for value in (1.0, 2.0, 3.0)]
    assert losses == [2.0, 4.0, 6.0]
    assert recorder.captured == [(1, 2)]
    assert recorder.launched == [(1, 2)]
    assert float(recorder.gradient) == 12.0


def test_each_shape_has_a_graph_of_its_own(recorder: Recorder, replayed: Replayed) -> None:
    replayed.start()
    for width in (2, 4, 2, 4, 2):
        replayed(batch(1.0, width))
    assert recorder.captured == [(1, 2), (1, 4), (1, 2)]
    assert recorder.launched == [(1, 2), (1, 4)]


def test_a_larger_shape_begins_a_new_pool_and_a_smaller_one_does_not(recorder: Recorder, replayed: Replayed) -> None:
    replayed.start()
    for width in (4, 4, 2, 2, 4, 2):
        replayed(batch(1.0, width))
    assert (recorder.pools, recorder.captured) == (1, [(1, 4), (1, 2)])
    for width in (8, 8, 4, 2):
        replayed(batch(1.0, width))
    assert (recorder.pools, recorder.captured[2:]) == (2, [(1, 8), (1, 4), (1, 2)])


def test_a_loss_does_not_change_with_the_next_replay(replayed: Replayed) -> None:
    replayed.start()
    replayed(batch(1.0))
    first = replayed(batch(2.0))
    replayed(batch(3.0))
    assert float(first) == 4.0


def test_what_cannot_be_captured_is_launched_and_told(recorder: Recorder, replayed: Replayed) -> None:
    recorder.fault = RuntimeError("operation not permitted when stream is capturing\nmore")
    replayed.start()
    losses = [float(replayed(batch(value))) for value in (1.0, 2.0)]
    assert losses == [2.0, 4.0]
    assert len(recorder.launched) == 2
    assert replayed.refused == "operation not permitted when stream is capturing"


def test_memory_that_runs_out_in_a_capture_is_an_error(recorder: Recorder, replayed: Replayed) -> None:
    recorder.fault = torch.OutOfMemoryError("of 1 GiB")
    replayed.start()
    replayed(batch(1.0))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(batch(1.0))


def test_the_end_of_a_capture_does_not_hide_why_it_failed(recorder: Recorder, replayed: Replayed) -> None:
    recorder.fault = RuntimeError("operation failed due to a previous error during capture")
    recorder.fault.__context__ = RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
    recorder.fault.__context__.__context__ = KeyError("handled long ago")
    replayed.start()
    for value in (1.0, 2.0):
        replayed(batch(value))
    assert replayed.refused == "Cannot copy between CPU and CUDA tensors during CUDA graph capture"


def test_the_end_of_a_capture_does_not_hide_that_memory_ran_out(recorder: Recorder, replayed: Replayed) -> None:
    recorder.fault = RuntimeError("operation failed due to a previous error during capture")
    recorder.fault.__context__ = torch.OutOfMemoryError("of 1 GiB")
    replayed.start()
    replayed(batch(1.0))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(batch(1.0))


def test_graphs_are_given_up_for_a_new_shape_that_does_not_fit_beside_them(
    recorder: Recorder, replayed: Replayed
) -> None:
    recorder.room = 0.9
    replayed.start()
    losses = [float(replayed(batch(1.0, width))) for width in (4, 4, 3, 4, 3)]
    assert losses == [4.0, 4.0, 3.0, 4.0, 3.0]
    assert (recorder.pools, recorder.captured) == (1, [(1, 4), (1, 3)]), "three quarters as large: it fits"
    for width in (5, 4, 5):
        replayed(batch(1.0, width))
    assert (recorder.pools, recorder.captured[2:]) == (3, [(1, 4), (1, 5)])
    assert recorder.launched == [(1, 4), (1, 3), (1, 5)]


def test_graphs_stay_while_other_passes_fit_beside_them(recorder: Recorder, replayed: Replayed) -> None:
    replayed.start()
    for _ in range(2):
        replayed(batch(1.0))
    replayed.make_room()
    replayed(batch(1.0))
    recorder.room = 0.0
    replayed.make_room()
    replayed(batch(1.0))
    assert (recorder.pools, len(recorder.captured), len(recorder.launched)) == (2, 2, 1)


def test_too_many_shapes_are_launched(recorder: Recorder, replayed: Replayed, monkeypatch: Any) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    replayed.start()
    for width in (4, 4, 2, 2):
        replayed(batch(1.0, width))
    assert recorder.captured == [(1, 4)]
    assert replayed.refused == "micro-batches have more than 1 shapes"


def test_released_graphs_are_captured_anew(recorder: Recorder, replayed: Replayed) -> None:
    replayed.start()
    for _ in range(2):
        replayed(batch(1.0))
    replayed.release()
    assert float(replayed(batch(3.0))) == 6.0
    assert (recorder.pools, recorder.captured, recorder.launched) == (2, [(1, 2), (1, 2)], [(1, 2)])


def test_too_many_shapes_leave_no_graphs_where_others_do_not_fit_beside_them(
    recorder: Recorder, replayed: Replayed, monkeypatch: Any
) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    replayed.start()
    for width in (4, 4, 2, 4):
        replayed(batch(1.0, width))
    recorder.room = 0.9
    for width in (2, 4):
        replayed(batch(1.0, width))
    assert recorder.captured == [(1, 4)]
    assert recorder.launched == [(1, 4), (1, 2), (1, 2), (1, 4)]


@pytest.mark.parametrize("data", [0.5, 3, True, [1, 2], [[0.5, 1.5], [2.5, 3.5]]])
def test_constants_are_written_on_their_device(data: Any) -> None:
    with ConstantsOnDevice():
        there = torch.tensor(data, device="meta")
    assert there.device.type == "meta"
    assert (there.dtype, there.shape) == (torch.tensor(data).dtype, torch.tensor(data).shape)


def test_constants_keep_the_dtype_that_is_asked_for() -> None:
    with ConstantsOnDevice():
        assert torch.tensor(2, device="meta", dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.tensor([1.0, 2.0]).tolist() == [1.0, 2.0]
