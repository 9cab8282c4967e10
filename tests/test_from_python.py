"""`qdist.plan` and `qdist.launch`: what the command line does, as functions."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import qdist
from qdist.cli.main import main
from qdist.core.errors import JobError, PlanError, RunError, SpecError
from qdist.core.spec.lookup import named_settings
from qdist.host.launch import ranks
from qdist.host.launch.claim import Claim
from qdist.host.run.rundir import RESULT
from tests.runtime.tiny import save_config


def test_a_plan_is_the_one_of_the_command_line() -> None:
    words = "plan --model llama-7b --gpus 2 --gpu-memory 24GiB --lora-r 8 --set train.eval_steps=3 --json"
    typed = CliRunner().invoke(main, words.split(), prog_name="qdist")
    asked = qdist.plan(model="llama-7b", gpus=2, gpu_memory="24GiB", lora_r=8, eval_steps=3)
    assert json.loads(msgspec.json.encode(asked)) == json.loads(typed.stdout)


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ({"optim.lr": 1e-4, "seq_len": 64}, {"optim.lr": 1e-4, "seq_len": 64}),
        ({"lr": 1e-4, "batch_size": 8, "lora_r": 4}, {"optim.lr": 1e-4, "global_batch": 8, "lora.r": 4}),
        ({"dropout": 0.1, "targets": ["q_proj"]}, {"lora.dropout": 0.1, "lora.targets": ["q_proj"]}),
        ({"data": Path("a") / "b.jsonl", "steps": None}, {"data.path": "a/b.jsonl", "steps": None}),
    ],
)
def test_settings_are_named_as_keys_as_their_last_parts_or_as_flags(
    named: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert named_settings(named) == settings


@pytest.mark.parametrize(
    ("named", "message", "attempt"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'", "optim.lr"),
        ({"seqlen": 1}, "unknown setting 'seqlen'", "seq_len"),
        ({"schedule": "cosine"}, "unknown setting 'schedule'", "split.schedule"),
        ({"bits": 5}, "bits cannot be 5: it is one of 2, 3, 4, 8, 16", "--bits 4"),
    ],
)
def test_a_wrong_setting_names_the_nearest(named: dict[str, Any], message: str, attempt: str) -> None:
    for asked in (partial(qdist.plan, gpus=1, gpu_memory="24GiB"), qdist.launch):
        with pytest.raises(SpecError) as caught:
            asked(model="llama-7b", **named)
        assert (caught.value.message, caught.value.try_) == (message, attempt)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="llama-65b") as caught:
        qdist.plan(model="llama-65b", gpus=1, gpu_memory="24GiB", placement="replicate")
    assert caught.value.try_


PEAKS, START = [[{"allocated": 1, "context": 1, "reserved": 1, "load": 1}]], {"load": None, "first_step": None}
"""Of the one device of one rank."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """Runs that would have been started; each ends at once with a result."""
    runs: list[Claim] = []

    def start(own: Claim, *, show: object, say: object) -> None:
        runs.append(own)
        plan = own.job.plan
        own.job.run.adapter.mkdir()
        result: dict[str, Any] = {"steps": plan.steps, "adapter_bytes": 1, "adapter_parameters": 1}
        result |= {"tokens_per_s": {"predicted": 1.0, "measured": None}, "start_seconds": START, "peaks": PEAKS}
        (own.job.run.path / RESULT).write_text(json.dumps(result))

    monkeypatch.setattr(ranks, "start", start)
    return runs


def test_a_launch_runs_to_its_end_and_a_finished_run_is_given_back(
    started: list[Claim], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_config(tmp_path / "model")
    settings: dict[str, Any] = {"model": model, "load_format": "dummy", "seq_len": 64, "gpus": 1, "held_out": 0}
    done = qdist.launch(run=tmp_path / "run", steps=3, **settings)
    assert (done.path, done.plan.steps, done.result["steps"]) == (tmp_path / "run", 3, 3)
    assert qdist.launch(run=tmp_path / "run", resume=True) == done
    assert len(started) == 1
    with pytest.raises(RunError, match="is finished after 3 steps, and no checkpoint of it is left to go on from"):
        qdist.launch(run=tmp_path / "run", resume=True, steps=5)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"{tmp_path / 'run'} is finished: 3 steps, adapter in {tmp_path / 'run' / 'adapter'}\n"


def test_a_launch_that_fails_raises_what_its_ranks_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise JobError("rank 0 died", try_="the same again")

    monkeypatch.setattr(ranks, "start", start)
    with pytest.raises(JobError, match="rank 0 died"):
        qdist.launch(
            model=save_config(tmp_path / "model"),
            load_format="dummy",
            steps=1,
            run=tmp_path / "run",
            gpus=1,
            seq_len=64,
        )


def test_only_loading_a_model_imports_torch() -> None:
    code = (
        "import sys, qdist\nbefore = sorted({'msgspec', 'click', 'torch'} & set(sys.modules))\n"
        "qdist.plan(model='llama-7b', gpus=1, gpu_memory='24GiB')\n"
        "print(before, 'torch' in sys.modules, 'click' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[] False False\n"
