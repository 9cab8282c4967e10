"""What only several GPUs can show of a split backbone: NCCL between stages, packed layers and Liger on a part."""

import pytest

from tests.gpu.conftest import Launch
from tests.gpu.test_placements import SHAPE, agree


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
    agree(two, one)
