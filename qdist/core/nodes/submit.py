"""How does a run of several nodes look as a job of SLURM, Kubernetes or SkyPilot? Pure text, from `launch/*.in`."""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence

import msgspec

from qdist.core.errors import SpecError

PORT = 29400
"""Port of the rendezvous where a job's nodes have their addresses to themselves."""
WARNING_S = 120
"""Seconds before the end of a job's time in which its run saves a checkpoint and ends."""
WORK = "/qdist"
"""Where a pod has its run and cache."""
RECIPE_FILE = "recipe.toml"
_RECIPE_FOLDER = "/etc/qdist"
_SKY_RECIPE = f"/tmp/qdist-{RECIPE_FILE}"
_RETRIES_PER_NODE = 3
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_DIRECTIVE = re.compile(r"[\w.,:@/+=%\[\]-]+", re.ASCII)
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class SubmittedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The run that a job starts, whatever starts the job."""

    name: str
    """A DNS label, of at most 50 characters: pods are called after it."""
    recipe: str
    """Name of a shipped recipe, or path of a file on this machine."""
    recipe_text: str = ""
    """What is in that file; empty for a shipped recipe, which every node has."""
    run: str = ""
    """The run directory; empty for one named after the job and its number."""
    least: int
    """Fewest nodes to go on with."""
    most: int
    """Nodes that are asked for."""
    gpus: int | None = None
    """GPUs that are asked for of each node; None for none."""
    words: tuple[str, ...] = ()
    """Further words of `qdist launch`, which its first start is given."""

    @property
    def nnodes(self) -> str:
        """Words of `--nnodes`: '2:4'."""
        return f"{self.least}:{self.most}"

    def started_as(self, recipe: str) -> tuple[str, ...]:
        """Words of `qdist launch` for the first start. recipe: as the job's nodes find it."""
        return (recipe, *((f"--gpus={self.gpus}",) if self.gpus else ()), *self.words)


class Slurm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is SLURM's own of a job."""

    program: tuple[str, ...]
    """What `qdist` is on the nodes, which share this machine's file system."""
    folder: str
    """Folder of runs that have no name."""
    time: str | None = None
    """Time limit as sbatch takes it: '24:00:00'."""
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    """Cores of each node."""
    options: tuple[str, ...] = ()
    """Further options of sbatch: '--constraint=a100'."""
    setup: str = ""
    """Shell commands that come first: 'module load cuda'."""


class Kubernetes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is Kubernetes' own of a job."""

    image: str
    volumes: tuple[str, ...] = ()
    """CLAIM:PATH of persistent volumes; a CLAIM alone is mounted at /qdist, where run and cache are."""


class SkyPilot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is SkyPilot's own of a job."""

    accelerators: str | None = None
    """'A100:8'; None for nodes without any."""
    spot: bool = False
    setup: str = "pip install qdist"
    mounts: tuple[str, ...] = ()
    """PATH=SOURCE of files, folders and buckets that every node sees."""


def job_name(wanted: str) -> str:
    """A name that every scheduler takes, from the stem of a recipe or as typed: 'My Recipe' -> 'my-recipe'."""
    plain = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"qdist-{plain}".rstrip("-")
    return plain[:50].rstrip("-")


def checked_name(name: str) -> str:
    """A name that was typed. Raises SpecError, with the nearest that works, if pods cannot be called after it."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{name!r} is not a name for a job: up to 50 of a-z, 0-9 and -, the first a letter",
            try_=f"--name {job_name(name)}",
        )
    return name


def slurm_script(template: str, job: SubmittedRun, own: Slurm) -> str:
    """The script for sbatch. Raises SpecError for options that cannot stand in one of its directives."""
    asked = (
        ("--gpus-per-node", job.gpus), ("--cpus-per-task", own.cpus), ("--time", own.time),
        ("--partition", own.partition), ("--account", own.account),
    )  # fmt: skip
    grows = job.least < job.most
    options = [f"{flag}={value}" for flag, value in asked if value is not None]
    options += [*own.options, *(["--no-kill"] if grows else [])]
    srun = [f"--cpus-per-task={own.cpus}"] if own.cpus else []  # srun does not inherit it (SLURM 22.05 and newer)
    srun += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"] if grows else []
    named = shlex.quote(job.run) if job.run else f"{shlex.quote(f'{own.folder}/{job.name}')}-$SLURM_JOB_ID"
    return _filled(template, {
        "name": job.name,
        "nodes": str(job.most),
        "options": "\n".join(f"#SBATCH {_directive(option)}" for option in options),
        "warning_s": str(WARNING_S),
        "run": named,
        "start": " ".join(map(_in_array, job.started_as(job.recipe))),
        "setup": own.setup,
        "srun": "".join(f" {word}" for word in srun),
        "program": shlex.join(own.program),
        "nnodes": job.nnodes,
    })  # fmt: skip


def kubernetes_manifest(template: str, job: SubmittedRun, own: Kubernetes, token: str) -> str:
    """Secret, recipe, Service and Job, as YAML for kubectl. token: that of the run.

    Raises SpecError for volumes that are none.
    """
    volumes = dict(map(_volume, own.volumes))
    work = [] if WORK in volumes else [f"- {{name: work, mountPath: {WORK}}}"]
    mounts = [f"- {{name: volume-{i}, mountPath: {yaml_text(path)}}}" for i, path in enumerate(volumes)]
    claims = [
        f"- {{name: volume-{i}, persistentVolumeClaim: {{claimName: {yaml_text(claim)}}}}}"
        for i, claim in enumerate(volumes.values())
    ]
    if job.recipe_text:
        mounts.append(f"- {{name: recipe, mountPath: {_RECIPE_FOLDER}}}")
        claims.append(f"- {{name: recipe, configMap: {{name: {yaml_text(job.name)}}}}}")
    recipe = f"{_RECIPE_FOLDER}/{RECIPE_FILE}" if job.recipe_text else job.recipe
    return _filled(template, {
        "name": job.name,
        "token": yaml_text(token),
        "recipe": _config_map(job) if job.recipe_text else "",
        "port": str(PORT),
        "most": str(job.most),
        "retries": str(_RETRIES_PER_NODE * job.most),
        "warning_s": str(WARNING_S),
        "image": yaml_text(own.image),
        "suffix": "" if job.run else "-${JOB_UID%%-*}",
        "nnodes": job.nnodes,
        "start": _indented([f"- {yaml_text(_unexpanded(word))}" for word in job.started_as(recipe)], 8),
        "run": yaml_text(_unexpanded(job.run or f"{WORK}/runs/{job.name}")),
        "limits": f"{{nvidia.com/gpu: {job.gpus}}}" if job.gpus else "{}",
        "mounts": _indented([*work, *mounts], 8),
        "volumes": _indented([*(["- {name: work, emptyDir: {}}"] if work else []), *claims], 6),
    })  # fmt: skip


def skypilot_task(task: str, script: str, job: SubmittedRun, own: SkyPilot) -> str:
    """The task for `sky launch`, as YAML. task, script: templates of the file and of what each node runs."""
    mounts = dict(map(_mount, own.mounts))
    recipe = job.recipe
    if job.recipe_text:
        mounts[_SKY_RECIPE], recipe = job.recipe, _SKY_RECIPE
    resources = [f"accelerators: {yaml_text(own.accelerators)}"] if own.accelerators else ["cpus: 4+"]
    resources += ["use_spot: true"] if own.spot else []
    listed = [f"{yaml_text(path)}: {yaml_text(source)}" for path, source in mounts.items()]
    run = _filled(script, {
        "run": _at_home(job.run) if job.run else f'"$HOME"/qdist/runs/{job.name}-"$SKYPILOT_TASK_ID"',
        "start": shlex.join(job.started_as(recipe)),
        "nnodes": job.nnodes,
        "port": str(PORT),
    })  # fmt: skip
    return _filled(task, {
        "name": job.name,
        "most": str(job.most),
        "resources": _indented(resources, 2),
        "mounts": "\n".join(["file_mounts:", _indented(listed, 2)]) if listed else "",
        "setup": yaml_block(own.setup),
        "script": yaml_block(run),
    })  # fmt: skip


def yaml_text(text: str) -> str:
    """A text as a YAML scalar between double quotes; what is not printable ASCII is escaped."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        if found[0] in '"\\':
            return f"\\{found[0]}"
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + re.sub(r'[^ -~]|["\\]', escaped, text) + '"'


def yaml_block(text: str, *, spaces: int = 2) -> str:
    """Lines as a literal block, indented by spaces, which a reader gives back to the byte; quoted if they are odd."""
    if not text or text[0] in " \n" or re.search(r"[^\n -~]", text):
        return yaml_text(text)
    keep = "-" if not text.endswith("\n") else "+" if text.endswith("\n\n") else ""
    return f"|{keep}\n" + textwrap.indent(text.removesuffix("\n"), " " * spaces, lambda line: True)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its @names@ replaced. Lines that hold nothing but empty values are left out."""
    lines = []
    for line in template.split("\n"):
        filled = re.sub(r"@([a-z_]+)@", lambda name: values[name[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled)
    return "\n".join(lines)


def _indented(lines: Sequence[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)


def _in_array(word: str) -> str:
    """A word of a shell's array, where a bare comma looks like a mistake to shellcheck (SC2054)."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _directive(option: str) -> str:
    """An option of sbatch. Raises SpecError for one that is not written as --name=value, in plain characters."""
    if not (option.startswith("-") and _DIRECTIVE.fullmatch(option)):
        raise SpecError(
            f"{option!r} cannot stand in a job script: sbatch reads --name=value without blanks and quotes there",
            try_="--sbatch --constraint=a100",
        )
    return option


def _volume(text: str) -> tuple[str, str]:
    """Path and claim of 'CLAIM:PATH'."""
    claim, _, path = text.partition(":")
    path = path or WORK
    if not _CLAIM.fullmatch(claim) or not path.startswith("/"):
        raise SpecError(f"{text!r} is not a persistent volume claim and its path", try_="--volume models:/models")
    return path.rstrip("/") or "/", claim


def _mount(text: str) -> tuple[str, str]:
    """Path and source of 'PATH=SOURCE'."""
    path, _, source = text.partition("=")
    if not source or not path.startswith(("/", "~/")):
        raise SpecError(f"{text!r} is not PATH=SOURCE", try_="--mount /models=s3://bucket/models")
    return path, source


def _at_home(path: str) -> str:
    """A path for a shell that may begin with ~/."""
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _unexpanded(text: str) -> str:
    """A text as the kubelet, which expands $(NAME) in arguments and variables, gives it back."""
    return text.replace("$", "$$")


def _config_map(job: SubmittedRun) -> str:
    return "\n".join([
        "apiVersion: v1", "kind: ConfigMap", "metadata:", f'  name: "{job.name}"',
        f'  labels: {{app.kubernetes.io/name: qdist, app.kubernetes.io/instance: "{job.name}"}}',
        "immutable: true", "data:",
        f"  {RECIPE_FILE}: {yaml_block(job.recipe_text, spaces=4)}", "---",
    ])  # fmt: skip
