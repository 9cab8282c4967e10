"""What only several GPUs can show of a split backbone: NCCL between stages, packed layers and Liger on a part."""

import pytest

from qdist.core.events import losses
from tests.gpu.conftest import Launch
from tests.gpu.test_gpu import adapter, events

SHAPE = {
    "dtype": "bfloat16",
    "steps": 20,
    "micro_batch": 1,
    "lora.dropout": 0.0,
    "train.held_out": 0.1,
    "train.eval_steps": 10,
}


@pytest.mark.gpu2
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_two_stages_train_the_adapter_of_one_gpu(launch: Launch, bits: int, checkpointing: str) -> None:
    shape = {**SHAPE, "train.checkpointing": checkpointing}
    one = launch(f"one-{bits}-{checkpointing}", bits=bits, **shape)
    two = launch(
        f"stages-{bits}-{checkpointing}", gpus=2, bits=bits, placement="split", **{**shape, "split.schedule": "1f1b"}
    )
    assert two.plan().schedule == "1f1b"
    assert list(losses(events(two)).values()) == pytest.approx(list(losses(events(one)).values()), rel=1e-3)
    held_out = [[event.held_out_loss for event in events(run) if event.held_out_loss] for run in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)
    first, second = adapter(one), adapter(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-2
