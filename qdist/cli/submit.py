"""`qdist submit`: a run of several nodes as a job of SLURM, Kubernetes or SkyPilot."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from qdist.cli.flags import FLAGS, SettingsCommand, setting_flags
from qdist.cli.views.plan import plan_lines, shown
from qdist.core.nodes.submit import (
    Kubernetes,
    SkyPilot,
    Slurm,
    SubmittedRun,
    kubernetes_manifest,
    skypilot_task,
    slurm_script,
)
from qdist.core.text import quoted
from qdist.host.launch.planning import PlanRequest
from qdist.host.nodes.submitting import FROM_FILE, planned_run, write_private
from qdist.host.nodes.submitting import submit as hand_over
from qdist.host.nodes.token import new_token
from qdist.host.templates import job_template
from qdist.host.terminal import say

F = TypeVar("F", bound=Callable[..., Any])
_DESCRIBED = ("gpu_name", "gpu_memory", "network")
"""What is said of the nodes for the plan alone."""


@click.group()
def submit() -> None:
    """Give a run of several nodes to a scheduler, which starts it and starts it again.

    The recipe and its settings are checked first, and planned where --gpu-name tells what the nodes have.
    """


def _shared(command: F) -> F:
    """What the jobs of all schedulers are asked with."""
    for decorate in reversed((
        click.argument("recipe"),
        click.option("--nodes", required=True, metavar="N|MIN:MAX", help="Nodes; with MIN, it goes on with so few."),
        setting_flags(*FLAGS),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE",
            help="Any setting of `qdist settings`, such as lora.alpha=32.",
        ),
        click.option("--name", help="Of the job; by default that of the recipe."),
        click.option("--gpu-name", help="The card of the nodes: the run is planned before it is submitted."),
        click.option("--gpu-memory", help="Memory of each, if it is not the card's usual."),
        click.option("--network", metavar="TEXT", help="Between the nodes, for the plan: 25Gbit, or 25Gbit,0.1ms."),
        click.option("--dry-run", is_flag=True, help="Print the job; submit nothing."),
        click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the job; submit nothing."),
    )):  # fmt: skip
        command = decorate(command)
    return command


@submit.command(cls=SettingsCommand)
@_shared
@click.option("--time", help="Time limit: 24:00:00. 120 s before it the run saves a checkpoint and is queued again.")
@click.option("--partition", help="As sbatch takes it.")
@click.option("--account", help="As sbatch takes it.")
@click.option("--cpus", type=click.IntRange(1), metavar="N", help="Cores of each node.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="Another option: --constraint=a100.")
@click.option("--setup", default="", help="Shell commands that come first: 'module load cuda'.")
def slurm(dry_run: bool, out: Path | None, **asked: Any) -> None:
    """A script for sbatch. Nodes share the file system of this machine, with qdist, model and data."""
    own = {name: asked.pop(name) for name in ("time", "partition", "account", "cpus", "options", "setup")}
    job = _job(asked)
    program = (sys.executable, "-P", "-m", "qdist")
    script = slurm_script(
        job_template("slurm.sh"), job, Slurm(program=program, folder=str(Path("runs").resolve()), **own)
    )
    _deliver(script, ["sbatch"], dry_run=dry_run, out=out)


@submit.command(cls=SettingsCommand)
@_shared
@click.option("--image", required=True, help="Container image with qdist on its PATH.")
@click.option("--namespace", help="Of the cluster; by default kubectl's.")
@click.option(
    "--volume", "volumes", multiple=True, metavar="CLAIM[:PATH]",
    help="Persistent volume claim; /qdist has run and cache, and is each pod's own without one.",
)  # fmt: skip
def kubernetes(
    dry_run: bool, out: Path | None, image: str, namespace: str | None, volumes: tuple[str, ...], **asked: Any
) -> None:
    """An Indexed Job with a Service and a Secret, for kubectl. Pods that vanish come back."""
    own = Kubernetes(image=image, volumes=volumes)
    manifest = kubernetes_manifest(job_template("kubernetes.yaml"), _job(asked), own, new_token())
    within = ["--namespace", namespace] if namespace else []
    # `apply` would give pods that come back another token than those that are there.
    _deliver(manifest, ["kubectl", *within, "create", "-f", "-"], dry_run=dry_run, out=out)


@submit.command(cls=SettingsCommand)
@_shared
@click.option("--accelerators", help="As SkyPilot calls them: A100:8. By default --gpu-name and --gpus.")
@click.option("--spot", is_flag=True, help="On instances that may vanish.")
@click.option("--setup", default="pip install qdist", show_default=True, help="Shell commands that install qdist.")
@click.option("--mount", "mounts", multiple=True, metavar="PATH=SOURCE", help="A folder or bucket that nodes see.")
def skypilot(dry_run: bool, out: Path | None, accelerators: str | None, **asked: Any) -> None:
    """A task for `sky launch`, on a cluster named like the job."""
    own = {name: asked.pop(name) for name in ("spot", "setup", "mounts")}
    card = (asked["gpu_name"] or "").replace(" ", "")
    job = _job(asked)
    usual = f"{card}:{job.gpus or 1}" if card else None
    task = skypilot_task(
        job_template("skypilot.yaml"), job_template("skypilot.sh"), job,
        SkyPilot(accelerators=accelerators or usual, **own),
    )  # fmt: skip
    sky = ["sky", "launch", "--yes", "--detach-run", "--cluster", job.name, "--secret", "QDIST_TOKEN", FROM_FILE]
    _deliver(task, sky, dry_run=dry_run, out=out, token=new_token())


def _job(asked: dict[str, Any]) -> SubmittedRun:
    """The run that is to be started; its plan, if there is one, is shown on standard error."""
    nodes, name = asked.pop("nodes"), asked.pop("name")
    recipe, assignments = asked.pop("recipe"), asked.pop("assignments")
    described = {key: asked.pop(key) for key in _DESCRIBED}
    request = PlanRequest(recipe=recipe, settings=asked, assignments=assignments, **described)
    job, plan = planned_run(request, nodes=nodes, name=name, flags=asked)
    if plan:
        say(shown(plan_lines(plan)), err=True)
    return job


def _deliver(job: str, command: Sequence[str], *, dry_run: bool, out: Path | None, token: str = "") -> None:
    """Print a job, write it, or hand it over."""
    if out:
        write_private(out, job)
        with_file = [str(out) if word in ("-", FROM_FILE) else word for word in command]
        say(f"{out}: {quoted(*with_file, *([out] if with_file == list(command) else []))}")
    if dry_run:
        say(job, end="")
    elif not out:
        hand_over(command, job, token=token)
