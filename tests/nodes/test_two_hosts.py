"""One run over two hosts, started over ssh, beside the same run on one of them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.bed import Bed, Host, wait_for, why_not
from tests.nodes.hosts_run import HostsRun, save_tiny

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made"),
    pytest.mark.slow,
]
SETTINGS: dict[str, Any] = {
    "load_format": "dummy", "bits": 16, "seq_len": 16, "global_batch": 4, "micro_batch": 1, "lora.r": 4, "steps": 4,
    "train.held_out": 0.0, "zero.stage": 0,
}  # fmt: skip
"""On one host the plan would take DeepSpeed's ZeRO 2, across hosts it does not, and they add up differently."""
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "model"))


def bed_of(folder: Path) -> Bed:
    """Two hosts with a disk and a core each: sums of floats depend on the threads of a rank."""
    core = min(os.sched_getaffinity(0))
    own = {"": {"QDIST_CACHE": str(folder / "own/cache"), "CUDA_VISIBLE_DEVICES": ""}}
    return Bed(folder / "bed", ["ash", "birch"], own=[folder / "own"], environ=own, cores=[[core], [core]])


def adapter_of_one_host(host: Host, run: Path, settings: dict[str, Any]) -> bytes:
    """What two ranks on one host come to."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    ran = host.run([sys.executable, "-P", "-m", "qdist", "launch", "--gpus", "2", "--run", run, *words])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return (host.disk(run) / ADAPTER).read_bytes()


def test_two_hosts_come_to_the_adapter_of_one_bit_for_bit(tmp_path: Path, model: str):
    settings = {**SETTINGS, "model": model}
    with bed_of(tmp_path) as bed:
        ash, birch = bed.hosts.values()
        run = HostsRun(bed, tmp_path / "own/run", settings)
        with run.launch() as launch:
            assert launch.wait(120) == 0, run.said()
        assert [event.kind for event in run.events([ash])] == ["formed", "finished"]
        adapters = [(host.disk(run.run) / ADAPTER).read_bytes() for host in (ash, birch)]
        wait_for(lambda: not run.left(), seconds=20, what="end of all processes")
        assert adapters == [adapter_of_one_host(ash, tmp_path / "own/alone", settings)] * 2


def test_a_run_that_one_host_stops_is_stopped_on_the_other_too(tmp_path: Path, model: str):
    """Each has a run directory of its own, in which a run that nobody ended would look killed."""
    with bed_of(tmp_path) as bed:
        ash, birch = bed.hosts.values()
        run = HostsRun(bed, tmp_path / "own/run", {**SETTINGS, "model": model, "steps": 100_000})
        with run.launch() as launch:
            wait_for(run.last_step, seconds=120, what="step")
            said = birch.done(sys.executable, "-P", "-m", "qdist", "stop", run.run)
            assert launch.wait(60) == 130, run.said()
        assert "with --hosts or --nnodes as it was launched" in said
        wait_for(lambda: not run.left(), seconds=20, what="end of all processes")
        states = [json.loads((host.disk(run.run) / "ended.json").read_text())["state"] for host in (ash, birch)]
        assert states == ["stopped", "stopped"]
