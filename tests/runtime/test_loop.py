"""Does the loop say what a rank is at, so that a long evaluation is not taken for one that is stuck?"""

from types import SimpleNamespace
from typing import Any

import torch

from qdist.host.rundir import RunDir
from qdist.runtime.forward import Forward
from qdist.runtime.loop import Trainer
from tests.plans import CPU, planned


def test_a_rank_moves_with_each_micro_batch_of_an_evaluation() -> None:
    moves: list[tuple[Any, ...]] = []
    batches = [[0], [1], [2]]
    samples: Any = SimpleNamespace(
        held_out=True, held_out_batches=lambda: batches, batch=lambda indices: indices, learned=len
    )
    forward = Forward(torch.nn.Identity(), samples, dtype=torch.float32, fused=False)
    forward.loss = lambda batch: torch.tensor(float(batch[0]))  # type: ignore[assignment,method-assign]
    comm: Any = SimpleNamespace(rank=0, sum=lambda *values: values)
    trainer = Trainer(
        planned("smollm2-135m", CPU, {"gpus": 1}),
        RunDir("nowhere"),
        engine=None,  # type: ignore[arg-type]
        samples=samples,
        comm=comm,
        evaluate=forward.evaluate,
        checksum=tuple,
        verify=str,
        report=lambda event: None,
        move=lambda *place: moves.append(place),
        stopping=bool,
    )
    trainer._judge(20)
    assert moves == [("evaluating", 20), *(("evaluating", 20, count, 3) for count in (1, 2, 3))]
    assert trainer.held_out == ((20, 1.0),)
