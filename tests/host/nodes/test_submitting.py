"""Does a job start a run on all of its nodes, save it before its time is over, and go on with it?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdist.core.errors import JobError, MachineError
from qdist.core.nodes.submit import Slurm, SubmittedRun, slurm_script
from qdist.host.nodes.submitting import FROM_FILE, submit, write_private
from qdist.host.templates import job_template

FAKES = Path(__file__).parents[2] / "fakes" / "slurm"
QDIST = """#!/bin/bash
# Stands for qdist: notes how it was started, and as a run saves a step and goes on until it is told to stop.
test $# -eq 7 && run=$5 || run=$4
echo "$*" >>"$FAKE_SLURM/started.$SLURM_NODEID"
echo "$SLURM_NODEID $SLURM_STEP_NUM_NODES $SLURMD_NODENAME $(cat /proc/$PPID/comm)" >>"$FAKE_SLURM/places.$SLURM_NODEID"
echo "$QDIST_TOKEN${QDIST_TOKEN_FILE-}" >"$FAKE_SLURM/token.$SLURM_NODEID"
if [ "$SLURM_NODEID" != 0 ] || [ "$2" = --resume ]; then exit 0; fi
mkdir -p "$run/checkpoints/step_000001"
touch "$run/plan.json"
if [ -n "${SAVES-}" ]; then touch "$run/checkpoints/step_000001/DONE"; fi
kill -TERM "$(cat "$FAKE_SLURM/$SLURM_JOB_ID.pid")"
until [ -e "$run/stop" ]; do :; done
exit 130
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job's script, where SLURM's programs are those of tests/fakes."""
    program = tmp_path / "a qdist"
    program.write_text(QDIST)
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setenv("FAKE_SLURM_NODES", "one,two,three")
    monkeypatch.setenv("QDIST_TOKEN_FILE", "/of/another/run")
    run = SubmittedRun(name="mine", recipe="demo", least=1, most=2)
    return slurm_script(job_template("slurm.sh"), run, Slurm(program=(str(program),), folder=str(tmp_path / "a run")))


def of_nodes(folder: Path, name: str) -> list[list[str]]:
    return [(folder / "slurm" / f"{name}.{node}").read_text().splitlines() for node in (0, 1)]


def test_a_job_near_its_end_saves_its_run_and_goes_on_with_it_when_it_starts_again(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVES", "1")
    submit(["sbatch", "--wait"], job)
    run = tmp_path / "a run" / "mine-1"
    first = f"launch demo --run {run} --nnodes 1:2"
    again = f"launch --resume --run {run} --nnodes 1:2"
    assert of_nodes(tmp_path, "started") == [[first, again], [first, again]]
    assert of_nodes(tmp_path, "places") == [["0 2 one slurmstepd"] * 2, ["1 2 two slurmstepd"] * 2]
    assert (tmp_path / "slurm" / "1.code").read_text() == "0\n"
    ((token,), (other,)) = of_nodes(tmp_path, "token")
    assert (len(token), other) == (32, token)


def test_a_job_that_saved_nothing_is_not_queued_again(job: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="sbatch ended with exit code 130"):
        submit(["sbatch", "--wait"], job)
    assert [len(lines) for lines in of_nodes(tmp_path, "started")] == [1, 1]


def test_the_token_of_a_job_is_in_no_script(job: str) -> None:
    assert "openssl" not in job


def test_a_program_that_is_not_here_is_named() -> None:
    with pytest.raises(MachineError, match="no-such-sbatch is not on the PATH of this machine") as raised:
        submit(["no-such-sbatch"], "")
    assert "--dry-run" in raised.value.try_


def test_a_program_finds_the_job_where_it_reads_it_and_the_token_in_its_environment(tmp_path: Path) -> None:
    program = tmp_path / "sky"
    program.write_text('#!/bin/sh\nprintf "%s|%s|" "$1" "$QDIST_TOKEN"; cat "$2"\n')
    program.chmod(0o755)
    code = (
        f"from qdist.host.nodes.submitting import submit; submit(['{program}', '-x', 'FILE'], 'a job', token='secret')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "-x|secret|a job"
    assert FROM_FILE == "FILE"


def test_a_job_that_may_hold_a_token_is_its_owners(tmp_path: Path) -> None:
    out = tmp_path / "job.yaml"
    out.write_text("before")
    write_private(out, "after")
    assert (out.read_text(), out.stat().st_mode & 0o777) == ("after", 0o600)
