"""What is read of a packed folder is held against what was written: by every rank, whatever part of it it reads."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from qdist.core.errors import ModelError, RunError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.planning.plan import Plan
from qdist.host.files import cache_path
from qdist.host.launch import prepare
from qdist.host.sources.cache import CHECKSUMS
from qdist.runtime.formats.checksum import SumCheck, digest_of
from qdist.runtime.formats.packed_folder import entries_of, write_tensors
from qdist.runtime.formats.recorded_sums import computed_sums, digest_of_folder, expected_sums, keep_sums, verify_folder
from qdist.runtime.model import weights
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import FolderWeights
from qdist.runtime.placements.registry import placement_of
from tests.plans import CPU, planned
from tests.runtime.conftest import TrainRun
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import real_job, save_data, save_model


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> prepare.Launch:
    """Over a model whose packed matrices are too large to be copied out of their file."""
    folder = tmp_path_factory.mktemp("sums")
    model = save_model(folder / "model", intermediate_size=8256, tokenizer=padded())
    return real_job(model, save_data(folder / "d.jsonl"), folder / "run", gpus=2, micro_batch=1)


@pytest.mark.parametrize(
    "layout",
    [{"placement": "replicate"}, {"placement": "shard"}, {"placement": "split", "split.schedule": "1f1b"}],
    ids=lambda layout: str(layout["placement"]),
)
def test_a_rank_that_reads_a_flipped_bit_ends_the_run_with_its_name(
    train: TrainRun, job: prepare.Launch, tmp_path: Path, layout: dict[str, Any]
) -> None:
    plan = job.plan
    again = real_job(
        Path(plan.source.path), Path(plan.spec.data.path), tmp_path / "run", gpus=2, micro_batch=1,
        **{key.replace(".", "__"): value for key, value in layout.items()},
    )  # fmt: skip
    packed = Path(again.plan.source.packed)
    file = packed / "model-00002-of-00003.safetensors"
    whole = file.read_bytes()
    flip(file, len(whole) // 2)
    try:
        with pytest.raises(AssertionError, match=r"error: .*model-00002-of-00003\.safetensors: the bytes of model"):
            train(again)
    finally:
        file.write_bytes(whole)
    logs = [again.run.log_file(rank).read_text() for rank in range(2)]
    said = next(log for log in logs if "the bytes of model" in log)
    assert "Traceback" not in said
    assert f"rm -r {packed}: what is in the cache is made again from the model" in said


class Matrix(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((rows, 7), dtype=torch.bfloat16, device="meta"), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["as stored", "converted"])
@pytest.mark.parametrize("copied", [0, 1 << 18], ids=["mapped", "copied"])
def test_small_and_large_tensors_are_summed_before_they_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, copied: int
) -> None:
    monkeypatch.setattr(weights, "_COPIED_ELEMENTS", copied)
    values = torch.randn(33, 7).to(dtype)
    write_tensors(tmp_path, "model.safetensors", entries_of({"a.weight": values}))
    sums = computed_sums(tmp_path)
    model = nn.ModuleDict({"a": Matrix(33)})
    fill(model, FolderWeights(tmp_path, sums), device=torch.device("cpu"))
    assert torch.equal(model["a"].weight, values.to(torch.bfloat16))
    flip(tmp_path / "model.safetensors", -1)
    fill(nn.ModuleDict({"a": Matrix(33)}), FolderWeights(tmp_path), device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"model\.safetensors: the bytes of a\.weight are not those that were written"):
        fill(nn.ModuleDict({"a": Matrix(33)}), FolderWeights(tmp_path, sums), device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"nothing was recorded of the tensor a\.weight"):
        fill(nn.ModuleDict({"a": Matrix(33)}), FolderWeights(tmp_path, {}), device=torch.device("cpu"))


def test_processes_of_one_node_divide_what_they_map(tmp_path: Path) -> None:
    names = [f"layer.{number}" for number in range(40)]
    spoilt = {name: torch.ones(3) for name in names}
    wrong = dict.fromkeys(names, (0, 0))
    found = []
    for which in range(3):
        for name, tensor in spoilt.items():
            check = SumCheck(wrong, share=(which, 3))
            try:
                check.add(tmp_path, name, tensor)
                check.finish()
            except ModelError:
                found.append(name)
    assert sorted(found) == sorted(names)


def test_cpu_ranks_share_and_gpus_do_not() -> None:
    plan: Plan = planned("smollm2-135m", CPU, {"gpus": 2})

    def shares(plan: Plan) -> list[tuple[int, int]]:
        return [placement_of(plan, rank, (torch.device("cpu"),)).sums_share() for rank in range(2)]

    assert shares(plan) == [(0, 2), (1, 2)]
    assert shares(msgspec.structs.replace(plan, placement="shard")) == [(0, 1), (0, 1)]
    assert shares(msgspec.structs.replace(plan, device="cuda")) == [(0, 1), (0, 1)]


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that says nothing of its sums."""
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    folder = save_gptq(tmp_path / "gptq", Gptq(shape=Shape(4, 32)), tokenizer=padded())
    (folder / CHECKSUMS).unlink()
    return folder


def test_what_somebody_else_wrote_is_summed_once_and_remembered_by_what_it_held(foreign: Path, tmp_path: Path) -> None:
    job = real_job(foreign, save_data(tmp_path / "d.jsonl"), tmp_path / "run", method="gptq-lora", gpus=1)
    source = job.plan.source
    sums = computed_sums(foreign)
    assert source.digest == digest_of_folder(foreign) == digest_of(sums)
    assert expected_sums(source) == sums
    flip(foreign / "model.safetensors", -5)
    assert expected_sums(source) == sums, "by which the tensor is named"
    shutil.rmtree(cache_path())
    with pytest.raises(RunError, match="does not hold the tensors that the run was prepared with") as caught:
        expected_sums(source)
    assert caught.value.try_.startswith(f"put a whole copy of {foreign}")
    flip(foreign / "model.safetensors", -5)
    assert expected_sums(source) == sums
    assert expected_sums(msgspec.structs.replace(source, digest="")) is None


def test_a_record_beside_the_tensors_that_is_of_others_is_refused(foreign: Path, tmp_path: Path) -> None:
    written = write_tensors(tmp_path, "a.safetensors", entries_of({"a": torch.ones(3)}))
    keep_sums(foreign, [written])
    with pytest.raises(ModelError, match="nothing was recorded of the tensor"):
        verify_folder(foreign)
    (foreign / CHECKSUMS).write_bytes(b'{"tensors": {"\xff": [1, 2]}}')
    with pytest.raises(ModelError, match=r"checksums\.json cannot be read"):
        verify_folder(foreign)
