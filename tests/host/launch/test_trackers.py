"""Is a tracker whose package is missing refused before anything starts?"""

from collections.abc import Callable, Collection
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from qdist.core.errors import MachineError
from qdist.core.spec.spec import RunSpec, resolve
from qdist.host.launch import claim, prepare
from qdist.host.launch.trackers import PACKAGES, refuse_missing
from qdist.host.machine.probe import PACKAGES as PROBED

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
    assert set(names) == set(PACKAGES)
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
