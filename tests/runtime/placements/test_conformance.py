"""Every placement keeps the promises of `qdist.runtime.placements.base`: the test to copy a new one's plan into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.planning.placements.registry import PLACEMENTS as PLANNED
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import losses
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.attach import add_adapter
from qdist.runtime.placements.base import Placement
from qdist.runtime.placements.registry import PLACEMENTS, placement_of
from qdist.runtime.train.checkpoint import load_tensors
from tests.runtime.tiny import backbone_of, dummy_job, save_config

TrainRun = Callable[[prepare.Launch], RunDir]

LAID: dict[str, dict[str, Any]] = {
    "replicate": {"placement": "replicate", "gpus": 2},
    "shard": {"placement": "shard", "gpus": 2},
    "shard in groups": {"placement": "shard", "gpus": 4, "gpus_per_group": 2},
    "split": {"placement": "split", "gpus": 2},
    "split in groups": {"placement": "split", "gpus": 4, "gpus_per_group": 2},
}
"""Settings that lay a backbone of four layers: one entry at least for each placement that is registered."""
SHAPE: dict[str, Any] = {
    "seq_len": 16, "global_batch": 8, "micro_batch": 1, "steps": 4, "lora__r": 4, "optim__lr": 3e-3,
    "train__held_out": 0.1, "train__keep": 9,
}  # fmt: skip
laid = pytest.mark.parametrize("name", LAID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def job_of(folder: Path) -> Callable[[dict[str, Any]], prepare.Launch]:
    model = save_config(folder / "model", num_hidden_layers=4)
    return lambda settings: dummy_job(model, folder / f"run{len(list(folder.iterdir()))}", **(SHAPE | settings))


def ranks_of(plan: Plan) -> list[Placement]:
    return [
        placement_of(plan, rank, (torch.device("cpu"),) * len(plan.ranks[rank].gpus or (0,)))
        for rank in range(plan.world_size)
    ]


def test_no_placement_is_left_out() -> None:
    assert {str(settings["placement"]) for settings in LAID.values()} == set(PLACEMENTS)
    assert [placement.name for placement in PLANNED] == list(PLACEMENTS), "each in planning and in runtime"


@laid
def test_every_share_of_the_data_is_computed_as_often_as_any_other(name: str, job_of: Any) -> None:
    plan = job_of(LAID[name]).plan
    shares = [place.data_rank for place in ranks_of(plan)]
    assert sorted(set(shares)) == list(range(plan.data_parallel))
    assert {shares.count(share) for share in shares} == {plan.world_size // plan.data_parallel}


@laid
def test_all_packed_bytes_are_held_against_their_sums(name: str, job_of: Any) -> None:
    """Each rank checks what it holds, or ranks that map the same file share the work out."""
    ranks = ranks_of(job_of(LAID[name]).plan)
    shares = [place.sums_share() for place in ranks]
    assert all(0 <= which < count for which, count in shares)
    assert all(count == 1 for _, count in shares) or {which for which, _ in shares} == set(range(shares[0][1]))


@laid
def test_who_answers_does_so_with_a_whole_model(name: str, job_of: Any) -> None:
    ranks = ranks_of(job_of(LAID[name]).plan)
    answering = {place.can_answer for place in ranks}
    assert not (any(place.in_step for place in ranks) and len(answering) > 1), (
        "ranks in step answer together or not at all"
    )
    assert all(place.adapter_parts == 1 for place in ranks if place.can_answer)


@laid
def test_the_parts_of_the_adapter_are_together_all_of_it(name: str, job_of: Any) -> None:
    plan = job_of(LAID[name]).plan
    whole = names_of(add_adapter(backbone_of(plan), plan))
    ranks = ranks_of(plan)
    parts = ranks[0].adapter_parts
    if ranks[0].in_step:  # each rank holds a slice of every matrix of the backbone, and all of the adapter
        assert parts == 1
        return
    held = [names_of(add_adapter(backbone_of(plan, arrange=place.arrange), plan)) for place in ranks]
    assert sorted(each for part in held[:parts] for each in part) == sorted(whole)
    assert all(held[rank] == held[rank % parts] for rank in range(plan.world_size))


@pytest.mark.slow
@laid
def test_a_run_trains_the_adapter_of_one_process(name: str, job_of: Any, train: TrainRun, one: RunDir) -> None:
    run = train(job_of(LAID[name]))
    assert list(losses_of(run)) == pytest.approx(list(losses_of(one)), rel=1e-4)
    first, second = (load_tensors(each.adapter / "adapter_model.safetensors") for each in (run, one))
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicate", "shard", "split"])
def test_a_run_starts_where_the_run_of_its_adapter_ended(name: str, job_of: Any, train: TrainRun, one: RunDir) -> None:
    run = train(job_of({**LAID[name], "adapter": str(one.path), "steps": 1}))
    before, now = one.result(), run.result()
    assert before is not None
    assert now is not None
    assert now["held_out"][0] == [0, pytest.approx(before["held_out"][-1][1], rel=1e-5)]


@pytest.fixture(scope="module")
def one(job_of: Any, train: TrainRun) -> RunDir:
    return train(job_of({"gpus": 1}))


def losses_of(run: RunDir) -> tuple[float, ...]:
    return tuple(losses([event for event in Follower(run.path).new_events() if event.rank == 0]).values())


def names_of(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
