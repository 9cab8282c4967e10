"""Are missing packages of trackers refused before anything starts, and their failures kept away from the run?"""

import sys
from collections.abc import Callable, Collection
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from qdist.core.errors import MachineError
from qdist.core.spec.run_spec import RunSpec, resolve
from qdist.host.launch import claim, prepare, trackers
from qdist.host.launch.trackers import PACKAGES, REMEDIES, Tracking, refuse_missing
from qdist.host.machine.probe import PACKAGES as PROBED
from qdist.host.run.rundir import RunDir

SMALL = {"model": "smollm2-135m", "load_format": "dummy", "steps": 5, "seq_len": 64, "gpus": 1, "run": "run"}


def installed(names: Collection[str]) -> Callable[[str], str]:
    """Versions on a machine with these packages alone."""

    def version_of(package: str) -> str:
        if package not in names:
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    return version_of


@pytest.mark.parametrize(("missing", "there"), [("wandb", ()), ("mlflow", ("wandb",)), ("trackio", ("mlflow-skinny",))])
def test_a_tracker_without_its_package_is_refused_with_the_command_to_install_it(
    missing: str, there: tuple[str, ...]
) -> None:
    with pytest.raises(MachineError, match=f"trackers={missing} .*not installed\n  try: pip install {missing},"):
        refuse_missing((missing,), version_of=installed(there))


def test_mlflow_skinny_will_do_where_a_server_is_named() -> None:
    there = installed(("mlflow-skinny", "wandb"))
    server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    refuse_missing(("mlflow", "wandb"), version_of=there, environment=server)
    with pytest.raises(MachineError, match="pip install mlflow,"):
        refuse_missing(("mlflow",), version_of=there, environment={})


def test_every_tracker_of_the_settings_has_a_package_that_doctor_looks_for() -> None:
    names = get_args(get_args(get_type_hints(RunSpec)["trackers"])[0])
    assert set(names) == set(PACKAGES) == set(REMEDIES)
    assert {packages[0] for packages in PACKAGES.values()} <= set(PROBED)


def test_a_launch_and_a_resume_are_refused_before_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(prepare, "refuse_missing", partial(refuse_missing, version_of=installed(())))
    with pytest.raises(MachineError, match="pip install wandb"):
        prepare.prepare(resolve(SMALL, {"trackers": ["wandb"]}))
    assert list(tmp_path.iterdir()) == []
    job = prepare.prepare(resolve(SMALL))
    claim.write(job)
    with pytest.raises(MachineError, match="pip install trackio"):
        prepare.prepare_resume(job.run, {"trackers": ["trackio"]})
    assert job.run.plan() == job.plan


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose trackers' processes are `program`, given the run's folder and a tracker's name."""
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return run


def program(run: RunDir, script: str) -> None:
    path = Path(sys.executable)
    path.write_text(f"#!/bin/sh\nshift 3\n{script}\n")
    path.chmod(0o755)


def ended(tracking: Tracking) -> None:
    """Wait until its processes have ended."""
    for sender in tracking._senders:
        sender.wait(None)


def test_a_run_without_trackers_starts_no_process(run: RunDir) -> None:
    said: list[str] = []
    with Tracking(run, (), say=said.append) as tracking:
        tracking.look()
    assert (said, list(run.path.iterdir()), list(run.logs.iterdir())) == ([], [run.logs], [])


def test_a_tracker_is_told_of_the_end_and_waited_for(run: RunDir) -> None:
    program(run, 'cat; echo "$2 done" > "$1/done"')
    said: list[str] = []
    with Tracking(run, ("wandb", "wandb"), say=said.append) as tracking:
        tracking.look()
        assert not (run.path / "done").exists()
    assert (run.path / "done").read_text() == "wandb done\n"
    assert said == []


def test_a_failure_is_told_once_and_the_tracker_started_again_after_longer_each_time(run: RunDir) -> None:
    program(run, 'echo x >> "$1/starts"; echo "OSError: no route to host and a long tale" >&2; exit 1')
    now, said, starts = [0.0], list[str](), dict[float, int]()
    with Tracking(run, ("wandb",), say=said.append, clock=lambda: now[0]) as tracking:
        for second in (0.0, 59.0, 60.0, 119.0, 179.0, 180.0, 181.0):
            now[0] = second
            for _ in range(2):  # that it ended, and that it is to be started
                ended(tracking)
                tracking.look()
            ended(tracking)
            starts[second] = (run.path / "starts").read_text().count("x")
    assert starts == {0.0: 1, 59.0: 1, 60.0: 2, 119.0: 2, 179.0: 2, 180.0: 3, 181.0: 3}
    why = "OSError: no route to host and a long tale"
    assert said == [
        f"warning: the tracker wandb failed and is started again in 1 min 00 s: {why}; try {REMEDIES['wandb']}",
        f"warning: the tracker wandb has this run up to step 0: {why}; all numbers are in {run.events}; send the rest: "
        f"qdist launch --resume --run {run.path}",
    ]


def test_a_tracker_that_was_ill_gets_the_rest_at_the_end(run: RunDir) -> None:
    program(run, '[ -e "$1/well" ] || exit 1; cat; touch "$1/done"')
    said: list[str] = []
    with Tracking(run, ("wandb",), say=said.append) as tracking:
        ended(tracking)
        tracking.look()
        (run.path / "well").touch()
    assert (run.path / "done").exists()
    assert len(said) == 1


@pytest.mark.parametrize("script", ["exec sleep 60", "kill -STOP $$"])
def test_a_tracker_that_hangs_is_ended_and_what_it_has_is_said(
    run: RunDir, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(run, script)
    monkeypatch.setattr(trackers, "_SOON_S", 0.05)
    (run.path / "trackers").mkdir()
    (run.path / "trackers/mlflow.json").write_text('{"known_as":"a","events":9,"step":7}')
    said: list[str] = []
    with Tracking(run, ("mlflow",), say=said.append, patience_s=0.1):
        pass
    assert said == [
        "waiting up to 0 s for mlflow",
        f"warning: the tracker mlflow has this run up to step 7: it did not answer in time; all numbers are in "
        f"{run.events}; send the rest: qdist launch --resume --run {run.path}",
    ]


def test_a_tracker_that_cannot_be_started_is_a_warning(run: RunDir) -> None:
    said: list[str] = []
    with Tracking(run, ("trackio",), say=said.append) as tracking:
        tracking.look()
    assert len(said) == 2
    assert all("No such file or directory" in line for line in said)


def test_a_run_that_fails_still_has_its_trackers_told(run: RunDir) -> None:
    program(run, 'cat; touch "$1/done"')
    with pytest.raises(ZeroDivisionError), Tracking(run, ("wandb",), say=print):
        raise ZeroDivisionError
    assert (run.path / "done").exists()
