"""Does `qdist launch` know whether it is on one machine or a node of several, and what its flags contradict?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.core.nodes.launchers import LAUNCHERS

SMALL = ("--model", "smollm2-135m", "--load-format", "dummy", "--set", "seq_len=64", "--set", "steps=5")
STALE = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.9", "SLURM_JOB_ID": "17", "SLURM_NNODES": "2"}
LINE = (
    "RANK, WORLD_SIZE, MASTER_ADDR, SLURM_JOB_ID and SLURM_NNODES of this shell are not obeyed: this run is on one "
    "machine (--nnodes to join others)"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a machine without GPUs, in a shell that no launcher started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in {"QDIST_TOKEN", "QDIST_TOKEN_FILE", *(name for launcher in LAUNCHERS for name in launcher.deciding)}:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="qdist")


def test_variables_of_a_launcher_that_is_gone_are_named_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = qdist("launch", *SMALL, "--dry-run")
    for name, value in STALE.items():
        monkeypatch.setenv(name, value)
    result = qdist("launch", *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{LINE}\n{plain.stdout}"


def test_a_plan_for_this_machine_names_them_and_one_for_another_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STALE.items():
        monkeypatch.setenv(name, value)
    words = ("plan", "--model", "smollm2-135m")
    assert " ".join(qdist(*words).stdout.split()).count(LINE) == 1
    assert "not obeyed" not in qdist(*words, "--gpus", "2", "--gpu-memory", "24GiB").stdout


def test_one_node_is_this_machine() -> None:
    assert qdist("launch", *SMALL, "--dry-run", "--nnodes", "1").exit_code == 0


@pytest.mark.parametrize(
    ("words", "wanted", "way"),
    [
        (("--nnodes", "2"), "--nnodes 2 does not say where the nodes meet", "--rendezvous HOST:PORT on each node"),
        (("--hosts", "hosts.toml", "--node-rank", "0"), "--hosts starts all machines from here",
         "leave --node-rank out"),
        (("--nnodes", "2:1"), "--nnodes 2:1 begins with the larger number", "--nnodes 1:2"),
        (("--nnodes", "2", "--node-rank", "2", "--rendezvous", "a:1"), "--node-rank 2 is not a node", "0 to 1"),
        (("--nnodes", "2", "--node-rank", "0", "--rendezvous", "a"), "'a' is not HOST:PORT", "--rendezvous a:29400"),
        (("--rendezvous", "127.0.0.1:29400"), "--nnodes does not say how many", "--nnodes 2"),
        (("--nnodes", "2", "--node-rank", "0", "--rendezvous", "127.0.0.1:1"), "no token for the run",
         "export QDIST_TOKEN=$(openssl rand -hex 16)"),
        (("--nnodes", "2", "--node-rank", "0", "--rendezvous", "127.0.0.1:1", "--dry-run"),
         "--dry-run is of one machine", "qdist plan"),
    ],
)  # fmt: skip
def test_flags_that_contradict_or_lack_others_are_refused_before_anything_is_written(
    words: tuple[str, ...], wanted: str, way: str, here: Path
) -> None:
    result = qdist("launch", *SMALL, *words)
    assert result.exit_code == 2
    assert wanted in " ".join(result.stderr.split())
    assert way in " ".join(result.stderr.split())
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("above", "environ", "wanted"),
    [
        ("slurmstepd", STALE | {"SLURM_STEP_ID": "0"}, "--dry-run is of one machine"),
        ("slurmstepd", STALE, "SLURM job 17 has 2 nodes, and qdist was not started by srun"),
        ("shell", STALE | {"SLURM_STEP_ID": "0"}, "SLURM_JOB_ID, SLURM_STEP_ID and SLURM_NNODES of this shell are not"),
    ],
)
def test_a_process_sees_by_its_ancestors_who_started_it(
    above: str, environ: dict[str, str], wanted: str, here: Path
) -> None:
    starter = here / above
    starter.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    starter.chmod(0o755)
    done = subprocess.run(
        [starter, sys.executable, "-m", "qdist", "launch", *SMALL, "--dry-run"],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert wanted in done.stdout + done.stderr


def test_hosts_do_not_go_with_flags_of_a_single_node() -> None:
    result = qdist("launch", *SMALL, "--hosts", "hosts.toml", "--nnodes", "2")
    assert result.exit_code == 2
    assert "--hosts starts all machines from here, and --nnodes is for starting each by itself" in result.output


def test_a_file_of_hosts_that_is_not_there_is_told(here: Path) -> None:
    result = qdist("launch", *SMALL, "--hosts", "hosts.toml")
    assert result.exit_code == 2
    assert "hosts.toml does not exist" in result.output
    assert not (here / "runs").exists()
