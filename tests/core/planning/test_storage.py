"""How much disk does a run take?"""

import pytest

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.storage import Packing
from qdist.core.planning.disk import packed_bytes, storage
from qdist.core.planning.plan import held_out_of
from tests.plans import CPU, planned

R8 = 2_442_240
"""Parameters of an adapter of rank 8 over SmolLM2."""


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"steps": 1}, 1),
        ({"steps": 50}, 1),
        ({"steps": 51}, 2),
        ({"steps": 1000}, 3),
        ({"steps": 1000, "train.keep": 5}, 6),
        ({"steps": 1000, "train.eval_steps": 10}, 4),
    ],
)
def test_checkpoints_are_those_kept_the_best_and_the_one_being_written(settings: dict[str, int], most: int) -> None:
    plan = planned("smollm2-135m", CPU, {"lora.r": 8, "seq_len": 64, **settings})
    takes = storage(plan)
    assert takes == (4 * R8, 12 * R8, most)
    assert takes.total == 4 * R8 + most * 12 * R8


@pytest.mark.parametrize(("new", "rows"), [((), 0), ((49152, 49153), 2)])
def test_rows_of_new_tokens_are_kept_with_the_adapter(new: tuple[int, ...], rows: int) -> None:
    plan = planned("smollm2-135m", CPU, {"lora.r": 8, "seq_len": 64}, new_token_ids=new)
    assert storage(plan).adapter == 4 * (R8 + rows * 576)


@pytest.mark.parametrize(
    ("packing", "mib"), [(Packing(bits=4), 106), (Packing(bits=8), 156), (Packing(bits=16), 257)], ids=str
)
def test_a_packed_model_is_as_large_as_its_layers_and_tables(packing: Packing, mib: int) -> None:
    """SmolLM2 at 4 bits: 107 MiB as bitsandbytes stores it, whose own records are not counted."""
    facts = from_config(config_of("smollm2-135m"), name="smollm2-135m")
    assert packed_bytes(facts, packing) >> 20 == pytest.approx(mib, abs=1)


@pytest.mark.parametrize(
    ("samples", "share", "held_out"), [(353, 0.1, 35), (5, 0.1, 1), (2, 0.9, 1), (100, 0.0, 0), (10, 0.99, 9)]
)
def test_at_least_one_sample_is_held_out_and_never_all(samples: int, share: float, held_out: int) -> None:
    assert held_out_of(samples, share) == held_out
