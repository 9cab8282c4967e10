"""Checks a run that a scheduler is to start, and hands its job to sbatch, kubectl or sky."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from qdist.core.errors import JobError, MachineError, SpecError, flag_of
from qdist.core.nodes.job import TOKEN
from qdist.core.nodes.places import node_range
from qdist.core.nodes.submit import SubmittedRun, checked_name, job_name
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import resolve
from qdist.core.text import quoted
from qdist.host.files import replacing, unwritable
from qdist.host.launch.planning import PlanRequest, planned
from qdist.host.nodes.asked import refuse_standard_input
from qdist.host.sources.models import find_shape
from qdist.host.templates import folder, recipe_path

FROM_FILE = "FILE"
"""Word of a scheduler's command that stands for the job's file; without it the job is read from standard input."""


def planned_run(
    request: PlanRequest, *, nodes: str, name: str | None, flags: Mapping[str, Any]
) -> tuple[SubmittedRun, Plan | None]:
    """The run that a job is to start, checked, and its plan for all of its nodes if their GPUs are named.

    flags: settings as typed by the names of launch's flags; None for those that were not.
    Raises what launch and plan raise for settings that cannot be, SpecError for names and numbers of nodes.
    """
    if request.recipe is None:
        raise SpecError("no recipe was named", try_="a TOML file, or the name of a shipped one: guanaco-65b")
    least, most = node_range(nodes, "--nodes")
    if request.network is not None and not request.described:
        raise SpecError("--network is for the plan of the nodes, which needs their card", ways=[{"gpu_name": "A100"}])
    spec = resolve(request.nested())
    if not spec.model:
        raise SpecError("no model was named", ways=[{"model": "llama-65b"}])
    refuse_standard_input(spec)
    of_nodes = msgspec.structs.replace(request, nodes=most if most > 1 else None)
    plan = planned(of_nodes) if request.described else None
    if plan is None:
        find_shape(spec.model, trusted=spec.trust_remote_code)
    path = recipe_path(request.recipe)
    shipped = path.parent == folder("launch")
    job = SubmittedRun(
        name=job_name(path.stem) if name is None else checked_name(name),
        recipe=path.stem if shipped else str(path.resolve()),
        recipe_text="" if shipped else path.read_text(encoding="utf-8"),
        run=spec.run or "", least=least, most=most, gpus=spec.gpus, words=_words(flags, request.assignments),
    )  # fmt: skip
    return job, plan


def _words(flags: Mapping[str, Any], assignments: Sequence[str]) -> tuple[str, ...]:
    """Settings as typed for launch, but for those that a job has a place of its own for."""
    typed = {name: value for name, value in flags.items() if value is not None and name not in ("run", "gpus")}
    words = [flag_of(name) if value is True else f"{flag_of(name)}={value}" for name, value in typed.items()]
    return (*words, *(f"--set={each}" for each in assignments))


def submit(command: Sequence[str], job: str, *, token: str = "") -> None:
    """Hand a job to a scheduler's program, whose output is the user's to read.

    command: with FROM_FILE where the program wants the path of a file. token: for the program's environment.
    Raises MachineError where the program is not installed, JobError where it refuses the job.
    """
    if shutil.which(command[0]) is None:
        raise MachineError(
            f"{command[0]} is not on the PATH of this machine", try_="--dry-run, or --out FILE to submit it elsewhere"
        )
    environment = {**os.environ, TOKEN: token} if token else dict(os.environ)
    with TemporaryDirectory(prefix="qdist-") as beside:
        words = [str(Path(beside, "job.yaml")) if word == FROM_FILE else word for word in command]
        Path(beside, "job.yaml").write_text(job, encoding="utf-8")
        done = subprocess.run(words, input=job, text=True, env=environment, check=False)
    if done.returncode:
        raise JobError(
            f"{command[0]} ended with exit code {done.returncode}", try_=f"what it said above; {quoted(*command)}"
        )


def write_private(out: Path, text: str) -> None:
    """Write a file that may hold a token: only its owner may read it. Raises RunError or JobError."""
    with unwritable(out), replacing(out) as (descriptor, _):
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, text.encode())
