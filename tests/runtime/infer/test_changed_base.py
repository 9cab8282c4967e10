"""Is a model that was replaced under a run noticed, and a copy of it taken for what it is?"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from qdist.core.errors import RunError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.planning.plan import Plan
from qdist.host import tasks
from qdist.host.launch import prepare as launcher
from qdist.host.run.rundir import PLAN, RunDir
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.load import open_model
from qdist.runtime.train.prepare import prepare
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.merging import merge
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model

REFUSAL = "is not the model that the run was trained on: the fingerprint of its tensors is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bases")
    save_data(made / "d.jsonl")
    for seed, name in enumerate(("g2k", "other")):
        save_gptq(made / name, Gptq(shape=Shape(4, 32)), tokenizer=padded(), seed=seed)
    return made


def trained(folder: Path, name: str, model: str = "g2k", **settings: object) -> RunDir:
    job = real_job(folder / model, folder / "d.jsonl", folder / name, **{"method": "gptq-lora", "gpus": 1, **settings})
    return adapted_run(job)[0]


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDir:
    return trained(folder, "chg")


@pytest.fixture
def replaced(folder: Path, run: RunDir) -> Iterator[Path]:
    """The base, another quantization of the same bits and group size in its place."""
    base, away = folder / "g2k", folder / "away"
    base.rename(away)
    yield shutil.copytree(folder / "other", base)
    shutil.rmtree(base)
    away.rename(base)


def test_a_run_does_not_go_on_over_another_quantization(run: RunDir, replaced: Path) -> None:
    with pytest.raises(RunError, match=f"{replaced} is not the model that {run.path} was trained on: ") as caught:
        launcher.prepare_resume(run, {})
    assert caught.value.try_ == "put that model back in its place, or start a new run on this one"


def test_nor_where_its_data_have_to_be_prepared_again(
    run: RunDir, replaced: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tasks, "prepare", lambda spec, *, device: prepare(spec))
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    data = Path(run.plan().data.path)  # type: ignore[union-attr]
    hidden = data.rename(data.with_name("hidden"))
    try:
        with pytest.raises(RunError, match="is not the model that"):
            launcher.prepare_resume(run, {})
    finally:
        hidden.rename(data)


@pytest.mark.parametrize(
    "use",
    [
        lambda run, out: open_model(run.path),
        lambda run, out: merge(run, out, onto="dequantized", dtype=torch.float16),
        lambda run, out: Backbone(run.plan()),
    ],
    ids=["generate", "merge", "export"],
)
def test_its_adapter_is_not_put_on_another_quantization(
    run: RunDir, replaced: Path, tmp_path: Path, use: Callable[[RunDir, Path], object]
) -> None:
    with pytest.raises(RunError, match=f"{replaced} {REFUSAL}"):
        use(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_with_other_times_is_the_model(folder: Path, run: RunDir) -> None:
    base, away = folder / "g2k", folder / "away"
    base.rename(away)
    shutil.copytree(away, base, copy_function=shutil.copyfile)
    for file in base.iterdir():
        os.utime(file, (1, 1))
    try:
        assert launcher.prepare_resume(run, {}).plan.source == run.plan().source
        open_model(run.path)
    finally:
        shutil.rmtree(base)
        away.rename(base)


def test_a_run_that_recorded_nothing_goes_on_as_before(run: RunDir, replaced: Path, tmp_path: Path) -> None:
    old = RunDir(shutil.copytree(run.path, tmp_path / "old"))
    plan = msgspec.to_builtins(run.plan())
    for recorded in ("fingerprint", "original", "digest"):
        del plan["source"][recorded]
    (old.path / PLAN).write_bytes(msgspec.json.encode(plan))
    assert launcher.prepare_resume(old, {}).plan.source == msgspec.convert(plan, Plan).source
    open_model(old.path)


def test_adapters_of_what_a_folder_held_at_two_times_are_not_added_up(
    folder: Path, run: RunDir, replaced: Path
) -> None:
    later = trained(folder, "later")
    with pytest.raises(RunError, match=r"g2k held other tensors when .*chg was trained than when .*later was"):
        Adapters([run, later], (0.5, 0.5))


def test_a_16_bit_model_that_ranks_read_as_it_is_has_a_record_and_one_packed_into_the_cache_has_none(
    folder: Path,
) -> None:
    save_model(folder / "plain", tokenizer=padded())
    for bits in (16, 4):
        job = real_job(folder / "plain", folder / "d.jsonl", folder / f"run-{bits}", bits=bits, gpus=1)
        assert bool(job.plan.source.fingerprint) == (bits == 16)
