"""Are jobs of schedulers those in tests/golden/, read as they are meant, whatever their values are?"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from qdist.core.errors import SpecError
from qdist.core.nodes.submit import (
    Kubernetes,
    SkyPilot,
    Slurm,
    SubmittedRun,
    checked_name,
    job_name,
    kubernetes_manifest,
    skypilot_task,
    slurm_script,
    yaml_block,
    yaml_text,
)
from qdist.host.templates import job_template

GOLDEN = Path(__file__).parents[2] / "golden"
TOKEN = "0123456789abcdef0123456789abcdef"
SHIPPED = SubmittedRun(name="guanaco-65b", recipe="guanaco-65b", least=4, most=4, gpus=8)
OWN = SubmittedRun(
    name="mine", recipe="/home/me/mine.toml", recipe_text='model = "llama-7b"\n\n[lora]\nr = 16\n',
    run="/data/runs/mine", least=2, most=4, gpus=1, words=("--steps=100", "--set=lora.targets=q_proj,v_proj"),
)  # fmt: skip
HOSTILE = ("it's", 'say "hi"', "$(touch pwned)", "`touch pwned`", "$HOME", "a\nb", "a\n  b \n", "-rf /", "\\", "#x",
           "é\x07\u2028😀", ": {}", "$$(X)", "@name@", "*", "!!python/object", "")  # fmt: skip


def slurm(job: SubmittedRun, **own: Any) -> str:
    usual = Slurm(program=("/opt/my venv/bin/python", "-P", "-m", "qdist"), folder="/home/me/runs")
    return slurm_script(job_template("slurm.sh"), job, msgspec.structs.replace(usual, **own))


def kubernetes(job: SubmittedRun, **own: Any) -> str:
    return kubernetes_manifest(
        job_template("kubernetes.yaml"), job, Kubernetes(**{"image": "me/qdist:1", **own}), TOKEN
    )


def skypilot(job: SubmittedRun, **own: Any) -> str:
    return skypilot_task(job_template("skypilot.yaml"), job_template("skypilot.sh"), job, SkyPilot(**own))


RENDERED = {
    "submit_slurm.sh": slurm(SHIPPED),
    "submit_slurm_between.sh": slurm(
        OWN, time="24:00:00", partition="gpu", account="lab", cpus=64, options=("--constraint=a100",),
        setup="module load cuda",
    ),
    "submit_kubernetes.yaml": kubernetes(SHIPPED),
    "submit_kubernetes_between.yaml": kubernetes(OWN, volumes=("shared", "models:/models")),
    "submit_skypilot.yaml": skypilot(SHIPPED, accelerators="A100:8"),
    "submit_skypilot_between.yaml": skypilot(OWN, spot=True, mounts=("/models=s3://mine/models",)),
}  # fmt: skip


@pytest.mark.parametrize("name", RENDERED)
def test_a_job_is_rendered_to_the_letter(name: str) -> None:
    assert RENDERED[name] == (GOLDEN / name).read_text()


def test_every_golden_job_is_rendered() -> None:
    assert sorted(path.name for path in GOLDEN.glob("submit_*")) == sorted(RENDERED)


def container(manifest: str) -> dict[str, Any]:
    job = next(each for each in yaml.safe_load_all(manifest) if each["kind"] == "Job")
    (only,) = job["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def scripts() -> dict[str, str]:
    """The shell scripts of all jobs, by name."""
    found = {name: text for name, text in RENDERED.items() if name.endswith(".sh")}
    for name in ("submit_skypilot.yaml", "submit_skypilot_between.yaml"):
        found[name] = "#!/bin/bash\n" + yaml.safe_load(RENDERED[name])["run"]
    for name in ("submit_kubernetes.yaml", "submit_kubernetes_between.yaml"):
        found[name] = "#!/bin/sh\n" + container(RENDERED[name])["args"][0]
    return found


@pytest.mark.parametrize("name", scripts())
def test_shellcheck_finds_nothing_in_a_jobs_script(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    # RUN, JOB_UID and the like come from the scheduler.
    script = tmp_path / "job.sh"
    script.write_text(scripts()[name])
    done = subprocess.run(
        ["shellcheck", "--exclude=SC2154", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def fits(value: Any, schema: Any, at: str = "") -> list[str]:
    """What is wrong with a document.

    schema: a type, a pattern, a constant, [schema of each item] or {field: schema}; one with ? may be left out.
    """
    if isinstance(schema, Mapping):
        return misfits(value, schema, at) if isinstance(value, Mapping) else [f"{at} is not a mapping"]
    if isinstance(schema, list):
        items = value if isinstance(value, list) and value else [None]
        return [wrong for index, item in enumerate(items) for wrong in fits(item, schema[0], f"{at}[{index}]")]
    if isinstance(schema, re.Pattern):
        return [] if isinstance(value, str) and schema.fullmatch(value) else [f"{at} is {value!r}"]
    right = type(value) is schema if isinstance(schema, type) else value == schema
    return [] if right else [f"{at} is {value!r}"]


def misfits(value: Mapping[str, Any], schema: Mapping[str, Any], at: str) -> list[str]:
    """What is wrong with a mapping."""
    fields = {name.rstrip("?"): own for name, own in schema.items()}
    wrong = [f"{at}.{name} is not a field" for name in value if name not in fields]
    wrong += [f"{at}.{name} is missing" for name in schema if not name.endswith("?") and name not in value]
    known = [name for name in value if name in fields]
    return wrong + [each for name in known for each in fits(value[name], fields[name], f"{at}.{name}")]


LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
PATH = re.compile(r"/.*")
METADATA = {"name": LABEL, "labels": {"app.kubernetes.io/name": "qdist", "app.kubernetes.io/instance": LABEL}}
POD = {
    "subdomain": LABEL, "restartPolicy": "Never", "automountServiceAccountToken": bool,
    "terminationGracePeriodSeconds": int,
    "containers": [{
        "name": LABEL, "image": str, "command": [str], "args": [str],
        "env": [{"name": re.compile("[A-Z_]+"), "value?": str, "valueFrom?": {
            "secretKeyRef?": {"name": LABEL, "key": str}, "fieldRef?": {"fieldPath": str},
        }}],
        "resources": {"limits": {"nvidia.com/gpu?": int}},
        "volumeMounts": [{"name": LABEL, "mountPath": PATH}],
    }],
    "volumes": [{
        "name": LABEL, "emptyDir?": {"medium?": "Memory"}, "persistentVolumeClaim?": {"claimName": LABEL},
        "configMap?": {"name": LABEL},
    }],
}  # fmt: skip
KINDS = {
    "Secret": {
        "apiVersion": "v1", "kind": "Secret", "metadata": METADATA, "immutable": bool, "type": "Opaque",
        "stringData": {"token": TOKEN},
    },
    "ConfigMap": {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": METADATA, "immutable": bool, "data": {"recipe.toml": str},
    },
    "Service": {
        "apiVersion": "v1", "kind": "Service", "metadata": METADATA,
        "spec": {
            "clusterIP": "None", "publishNotReadyAddresses": True, "selector": METADATA["labels"],
            "ports": [{"name": LABEL, "port": int}],
        },
    },
    "Job": {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": METADATA,
        "spec": {
            "completionMode": "Indexed", "completions": int, "parallelism": int, "backoffLimit": int,
            "podFailurePolicy": {"rules": [{
                "action": re.compile("Ignore|FailJob|Count"),
                "onPodConditions?": [{"type": str, "status": str}],
                "onExitCodes?": {"containerName": "qdist", "operator": re.compile("In|NotIn"), "values": [int]},
            }]},
            "template": {"metadata": {"labels": METADATA["labels"]}, "spec": POD},
        },
    },
}  # fmt: skip
"""Fields of the Kubernetes API (v1, batch/v1; kubernetes.io/docs/reference) that a job uses, with their types."""
TASK = {
    "name": LABEL, "num_nodes": int, "resources": {"accelerators?": str, "cpus?": str, "use_spot?": bool},
    "secrets": {"QDIST_TOKEN": None}, "file_mounts?": dict, "setup": str, "run": str,
}  # fmt: skip
"""Fields of a SkyPilot task (docs.skypilot.co/en/latest/reference/yaml-spec.html)."""


@pytest.mark.parametrize(
    ("manifest", "kinds"),
    [
        (RENDERED["submit_kubernetes.yaml"], ["Secret", "Service", "Job"]),
        (RENDERED["submit_kubernetes_between.yaml"], ["Secret", "ConfigMap", "Service", "Job"]),
        (kubernetes(msgspec.structs.replace(SHIPPED, gpus=None, name="null")), ["Secret", "Service", "Job"]),
    ],
)
def test_what_kubectl_is_given_has_the_fields_of_the_api(manifest: str, kinds: list[str]) -> None:
    documents = list(yaml.safe_load_all(manifest))
    assert [each["kind"] for each in documents] == kinds
    assert [wrong for each in documents for wrong in fits(each, KINDS[each["kind"]], each["kind"])] == []


def test_every_volume_of_a_pod_is_mounted_and_every_mount_is_of_a_volume() -> None:
    for manifest in (RENDERED["submit_kubernetes.yaml"], RENDERED["submit_kubernetes_between.yaml"]):
        pod = list(yaml.safe_load_all(manifest))[-1]["spec"]["template"]["spec"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container(manifest)["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert {"/qdist", "/dev/shm"} <= set(mounted.values())


@pytest.mark.parametrize("name", [name for name in RENDERED if "skypilot" in name])
def test_what_sky_is_given_has_the_fields_of_a_task(name: str) -> None:
    assert fits(yaml.safe_load(RENDERED[name]), TASK) == []


@pytest.mark.parametrize("name", RENDERED)
def test_a_token_stands_in_a_secret_alone(name: str) -> None:
    assert RENDERED[name].count(TOKEN) == ("kubernetes" in name)
    assert "--token" not in RENDERED[name]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_shell_gives_back_every_word_of_a_job(value: str, tmp_path: Path) -> None:
    """By running the scripts with a `qdist` and an `srun` that print what they are given."""
    job = msgspec.structs.replace(SHIPPED, words=(f"--set=x={value}",), run=f"{tmp_path}/{value.strip('/')}x")
    wanted = ["launch", "guanaco-65b", "--gpus=8", f"--set=x={value}", "--run", job.run, "--nnodes", "4:4"]
    task = yaml.safe_load(skypilot(job))
    program = (str(tmp_path / "bin" / "qdist"),)
    assert words_of(slurm(job, program=program), "bash", tmp_path) == wanted
    assert words_of(task["run"], "bash", tmp_path) == [*wanted, "--node-rank", "1", "--rendezvous", "10.0.0.1:29400"]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_pod_gives_back_every_word_of_a_job(value: str, tmp_path: Path) -> None:
    job = msgspec.structs.replace(SHIPPED, words=(f"--set=x={value}",), run=f"/qdist/{value}")
    pod = container(kubernetes(job, image=value))
    assert pod["image"] == value
    script, *arguments = map(as_the_kubelet_does, pod["args"])
    run = next(as_the_kubelet_does(each["value"]) for each in pod["env"] if each["name"] == "RUN")
    environment = {"RUN": run, "JOB_COMPLETION_INDEX": "1", "RENDEZVOUS": "a:1"}
    found = words_of(script, "sh", tmp_path, *arguments, **environment)
    wanted = ["launch", "guanaco-65b", "--gpus=8", f"--set=x={value}", "--run", job.run, "--nnodes", "4:4"]
    assert found == [*wanted, "--node-rank", "1", "--rendezvous", "a:1"]


def as_the_kubelet_does(text: str) -> str:
    """$(NAME) is replaced, $$ is $ (k8s.io/kubernetes/third_party/forked/golang/expansion)."""
    return re.sub(r"\$(\$|\(\w*\))", lambda found: "$" if found[1] == "$" else "EXPANDED", text)


def words_of(script: str, shell: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What a script gives to `qdist`; `srun` runs what stands behind its own options."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    printing = 'for word in "$@"; do printf "%s\\0" "$word"; done'
    for name, body in (("qdist", printing), ("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    usual = {
        "PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder), "SLURM_JOB_ID": "1", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "1",
    }  # fmt: skip
    done = subprocess.run(
        [shell, "-c", script, *(arguments or ("job",))], env={**usual, **environment}, cwd=folder, timeout=30,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not (folder / "pwned").exists()
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("value", [*HOSTILE, "a\n\n", "a\n", " a", "\na", "a\n \nb", "tab\t", "a\r\nb"])
def test_yaml_gives_back_every_text(value: str) -> None:
    text = (
        f"one: {yaml_text(value)}\ntwo: {yaml_block(value)}\nthree:\n  four: {yaml_block(value, spaces=4)}\nfive: 5\n"
    )
    assert yaml.safe_load(text) == {"one": value, "two": value, "three": {"four": value}, "five": 5}


@pytest.mark.parametrize(
    "text", ["--comment=a b", "constraint=a100", "--x='y'", "--x=$(y)", "--x\n#SBATCH --y", "", "--ünder"]
)
def test_an_option_that_a_directive_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="cannot stand in a job script"):
        slurm(SHIPPED, options=(text,))


def test_a_time_limit_with_a_day_and_a_count_of_cards_can_stand_there() -> None:
    script = slurm(SHIPPED, time="1-12:00:00", options=("--gres=gpu:a100:8", "--exclude=node[1-3,7]"))
    assert "#SBATCH --time=1-12:00:00\n#SBATCH --gres=gpu:a100:8\n#SBATCH --exclude=node[1-3,7]\n" in script


@pytest.mark.parametrize("volume", ["", "Claim", "claim:work", "a b:/c", "../x:/c"])
def test_a_volume_that_is_none_is_refused(volume: str) -> None:
    with pytest.raises(SpecError, match="is not a persistent volume claim"):
        kubernetes(SHIPPED, volumes=(volume,))


@pytest.mark.parametrize("mount", ["", "models", "models=s3://x", "/models="])
def test_a_mount_that_is_none_is_refused(mount: str) -> None:
    with pytest.raises(SpecError, match="is not PATH=SOURCE"):
        skypilot(SHIPPED, mounts=(mount,))


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("guanaco-65b", "guanaco-65b"),
        ("My Recipe_2", "my-recipe-2"),
        ("7b", "qdist-7b"),
        ("é", "qdist"),
        ("x" * 80, "x" * 50),
    ],
)
def test_a_job_is_named_after_its_recipe(wanted: str, name: str) -> None:
    assert job_name(wanted) == checked_name(name) == name


@pytest.mark.parametrize("name", ["", "Mine", "7b", "a_b", "a-", "x" * 51, "a\n"])
def test_a_name_that_no_pod_can_have_is_refused_with_one_that_works(name: str) -> None:
    with pytest.raises(SpecError, match="is not a name for a job") as raised:
        checked_name(name)
    assert checked_name(shlex.split(raised.value.try_)[1])


def test_a_run_without_a_name_is_the_jobs_own_and_stays_so_when_it_starts_again() -> None:
    assert "\nrun=/home/me/runs/guanaco-65b-$SLURM_JOB_ID\n" in RENDERED["submit_slurm.sh"]
    assert "run=$RUN-${JOB_UID%%-*}\n" in RENDERED["submit_kubernetes.yaml"]
    assert "run=/data/runs/mine\n" in RENDERED["submit_slurm_between.sh"]
    assert "run=$RUN\n" in RENDERED["submit_kubernetes_between.yaml"]
