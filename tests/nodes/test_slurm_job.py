"""Does a job of SLURM run whole on two hosts, and go on where the end of its time stopped it?"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodes.bed import Bed, wait_for, why_not
from tests.runtime.tiny import save_config

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes" / "slurm"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made here")]


def losses(run: Path) -> list[float]:
    lines = (run / "events" / "rank000.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if "loss" in event]


def test_a_job_runs_on_two_hosts_and_goes_on_after_the_end_of_its_time(tmp_path: Path) -> None:
    recipe, run, log = tmp_path / "tiny.toml", tmp_path / "run", tmp_path / "tiny-1.log"
    recipe.write_text(
        f'model = "{save_config(tmp_path / "model")}"\nload_format = "dummy"\nseq_len = 16\nglobal_batch = 4\n'
        f'steps = 200\nrun = "{run}"\n[lora]\nr = 4\n[train]\nsave_steps = 50\n'
    )
    with Bed(tmp_path / "bed", ["one", "two"]) as bed:
        entering = tmp_path / "enter"
        keepers = "\n".join(f"{name}) keeper={host.keeper} ;;" for name, host in bed.hosts.items())
        words = '"$keeper" -n -m -u -i -p --'
        entering.write_text(f'#!/bin/sh\ncase $1 in\n{keepers}\nesac\nshift\nexec nsenter -t {words} "$@"\n')
        entering.chmod(0o755)
        environment = {
            **os.environ, "PATH": f"{FAKES}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path / "slurm"),
            "FAKE_SLURM_NODES": "one,two", "FAKE_SLURM_ENTER": f"{entering} {{node}}", "PYTHONPATH": str(ROOT),
            "QDIST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        submitted = subprocess.Popen(
            [sys.executable, "-m", "qdist", "submit", "slurm", str(recipe), "--nodes", "2", "--sbatch=--wait"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        saved = run / "checkpoints" / "step_000050" / "DONE"
        wait_for(lambda: saved.exists() or submitted.poll() is not None, seconds=60, what="a checkpoint")
        assert saved.exists(), log.read_text()
        # What SLURM does two minutes before the end of the job's time.
        os.kill(int((tmp_path / "slurm" / "1.pid").read_text()), signal.SIGTERM)
        said, _ = submitted.communicate(timeout=180)
    assert (submitted.returncode, said) == (0, "Submitted batch job 1\n"), log.read_text()
    assert len(losses(run)) == 200
    assert (run / "result.json").exists()
