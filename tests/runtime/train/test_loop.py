"""Does the loop say what a rank is at, so that a long evaluation is not taken for one that is stuck?"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdist.core.errors import RunError
from qdist.core.telemetry.events import Event
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.objective import Forward
from qdist.runtime.placements.registry import placement_of
from qdist.runtime.train.loop import Trainer
from tests.plans import CPU, planned

LAST = ["save 4", "judge 4", "note 4"]


def trainer_of(
    samples: Any, *, evaluate: Any = None, move: Any = None, total: Any = None, report: Any = None, **settings: Any
) -> Trainer:
    comm: Any = SimpleNamespace(rank=0, sum=total or (lambda *values: values), gather=lambda value: [value])
    engine: Any = SimpleNamespace(replayed=None)
    plan = planned("smollm2-135m", CPU, {"gpus": 1, **settings})
    return Trainer(
        plan,
        RunDir("nowhere"),
        engine=engine,
        samples=samples,
        comm=comm,
        place=placement_of(plan, 0, (torch.device("cpu"),)),
        evaluate=evaluate,
        checksum=tuple,
        verify=str,
        report=report or (lambda event: None),
        move=move or (lambda *place: None),
        stopping=bool,
    )


def test_a_rank_moves_with_each_micro_batch_of_an_evaluation() -> None:
    moves: list[tuple[Any, ...]] = []
    batches = [[0], [1], [2]]
    samples: Any = SimpleNamespace(
        held_out=True,
        held_out_batches=lambda: batches,
        batch=lambda indices: indices,
        learned=len,
        plan=SimpleNamespace(packed=False, seq_len=8),
    )
    forward = Forward(torch.nn.Identity(), samples, dtype=torch.float32, fused=False)
    forward.loss = lambda batch: torch.tensor(float(batch[0]))  # type: ignore[assignment,method-assign]
    trainer = trainer_of(samples, evaluate=forward.evaluate, move=lambda *place: moves.append(place))
    trainer._judge(20)
    assert moves == [("evaluating", 20), *(("evaluating", 20, count, 3) for count in (1, 2, 3))]
    assert trainer.held_out == ((20, 1.0),)


@pytest.mark.parametrize(
    ("resumed_at", "held_out", "expected"),
    [
        (
            0,
            (),
            ["judge 0", "step 0", "step 1", "save 2", "step 2", "judge 3", "step 3", "save 4", "judge 4", "note 4"],
        ),
        (2, ((0, 9.0),), ["step 2", "judge 3", "step 3", *LAST]),
        (4, ((0, 9.0), (3, 8.0)), ["judge 4", "note 4"]),
        (4, ((0, 9.0), (3, 8.0), (4, 7.0)), []),
    ],
    ids=["from the start", "from a checkpoint", "killed in the last evaluation", "killed after it"],
)
def test_a_step_is_saved_before_it_is_judged_and_an_evaluation_that_was_cut_off_is_made_again(
    resumed_at: int, held_out: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(SimpleNamespace(held_out=True), steps=4, **{"train.save_steps": 2, "train.eval_steps": 3})
    done: list[str] = []

    def resume() -> int:
        trainer.held_out = held_out
        return resumed_at

    def judge(step: int) -> None:
        done.append(f"judge {step}")
        trainer.held_out = (*trainer.held_out, (step, 9.0))

    monkeypatch.setattr(trainer, "_resume", resume)
    monkeypatch.setattr(trainer, "_judge", judge)
    monkeypatch.setattr(trainer, "_is_best", lambda step: False)
    for name in ("step", "save", "note"):
        monkeypatch.setattr(trainer, f"_{name}", lambda step, name=name: done.append(f"{name} {step}"))
    assert trainer.train()
    assert done == expected


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_whose_loss_is_no_number_before_training_ends_on_every_rank(loss: float) -> None:
    """This rank's own part is a number; that of all ranks together, which each of them has, is none."""
    events: list[Event] = []
    samples: Any = SimpleNamespace(held_out=True, held_out_batches=lambda: [[0]])
    trainer = trainer_of(samples, evaluate=lambda *_: (4.0, 2), total=lambda *_: (loss, 8.0), report=events.append)
    with pytest.raises(RunError, match=f"the held-out loss is {loss} before any training") as caught:
        trainer.train()
    assert "weights or data are at fault, not the learning rate" in caught.value.message
    assert caught.value.try_ == "download the model again, or other data"
    assert [event.kind for event in events] == ["start", "eval"]


def test_in_fp16_its_range_may_be_at_fault() -> None:
    samples: Any = SimpleNamespace(held_out=True, held_out_batches=lambda: [[0]])
    trainer = trainer_of(samples, evaluate=lambda *_: (math.nan, 2))
    trainer.scale.dynamic = True
    with pytest.raises(RunError, match="weights, data or the range of fp16 are at fault") as caught:
        trainer._judge(0)
    assert caught.value.try_ == "--set dtype=bfloat16"


def test_a_held_out_loss_that_is_no_number_later_is_left_to_the_steps() -> None:
    samples: Any = SimpleNamespace(held_out=True, held_out_batches=lambda: [[0]])
    trainer = trainer_of(samples, evaluate=lambda *_: (math.nan, 2))
    trainer._judge(20)
    assert math.isnan(trainer.held_out[-1][1])


def test_a_rank_is_at_a_step_before_its_data_are_asked_for() -> None:
    """They may hang, on a disk that does not answer: then this rank is to be blamed, and not those that wait for it."""
    moves: list[tuple[Any, ...]] = []

    def hangs(step: int) -> list[list[int]]:
        assert moves == [("training", step + 1)]
        raise TimeoutError

    trainer = trainer_of(SimpleNamespace(step=hangs), move=lambda *place: moves.append(place))
    trainer.comm.device = torch.device("cpu")  # type: ignore[misc]
    with pytest.raises(TimeoutError):
        trainer._step(60)
