"""Does `qdist submit` check what it is given, print the job, write it, or hand it to the scheduler?"""

import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from qdist.cli.main import main

SLURM = ("slurm", "guanaco-65b", "--nodes", "2:4", "--gpus", "8")
KUBERNETES = ("kubernetes", "guanaco-65b", "--nodes", "4", "--gpus", "8", "--image", "me/qdist:1")
SKYPILOT = ("skypilot", "guanaco-65b", "--nodes", "4", "--gpus", "8", "--accelerators", "A100:8")
BATCH = ("--set", "global_batch=32")
"""The recipe's 16 are too few for 32 ranks."""


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["submit", *arguments], prog_name="qdist")


@pytest.fixture
def schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note what they are given: NAME.words and NAME.job."""
    for name in ("sbatch", "kubectl", "sky"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho "$@" >"{tmp_path}/{name}.words"\nfor last; do :; done\n'
            f'if [ -f "$last" ]; then cat "$last"; else cat; fi >"{tmp_path}/{name}.job"\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("words", [SLURM, KUBERNETES, SKYPILOT], ids=lambda words: words[0])
def test_a_dry_run_prints_the_job_and_submits_nothing(words: tuple[str, ...], schedulers: Path) -> None:
    result = qdist(*words, "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "guanaco-65b" in result.stdout
    assert list(schedulers.glob("*.words")) == []


@pytest.mark.parametrize("words", [SLURM, KUBERNETES, SKYPILOT], ids=lambda words: words[0])
def test_data_from_standard_input_is_refused_before_a_job_waits_for_it(words: tuple[str, ...]) -> None:
    result = qdist(*words, "--data", "-", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "standard input (-) is one node's, and each node reads the data" in result.stderr


def test_sbatch_reads_the_script(schedulers: Path) -> None:
    assert qdist(*SLURM, "--time", "2:00:00", "--lr", "1e-4", "--set", "lora.r=16").exit_code == 0
    script = (schedulers / "sbatch.job").read_text()
    assert (schedulers / "sbatch.words").read_text() == "\n"
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --time=2:00:00\n" in script
    assert "start=(guanaco-65b --gpus=8 --lr=1e-4 --set=lora.r=16)\n" in script


def test_kubectl_creates_what_it_reads(schedulers: Path) -> None:
    assert qdist(*KUBERNETES, "--namespace", "lab").exit_code == 0
    assert (schedulers / "kubectl.words").read_text() == "--namespace lab create -f -\n"
    kinds = [each["kind"] for each in yaml.safe_load_all((schedulers / "kubectl.job").read_text())]
    assert kinds == ["Secret", "Service", "Job"]


def test_sky_launches_a_file_and_takes_the_token_from_its_environment(schedulers: Path) -> None:
    assert qdist(*SKYPILOT).exit_code == 0
    words = (schedulers / "sky.words").read_text().split()
    assert words[:-1] == ["launch", "--yes", "--detach-run", "--cluster", "guanaco-65b", "--secret", "QDIST_TOKEN"]
    assert yaml.safe_load((schedulers / "sky.job").read_text())["num_nodes"] == 4


def test_a_recipe_of_ones_own_goes_with_the_job(schedulers: Path) -> None:
    recipe = schedulers / "My recipe.toml"
    recipe.write_text('model = "llama-7b"\ndata = "/data/mine.jsonl"\nrun = "/qdist/runs/mine"\n')
    assert qdist("kubernetes", str(recipe), *KUBERNETES[2:]).exit_code == 0
    documents = {each["kind"]: each for each in yaml.safe_load_all((schedulers / "kubectl.job").read_text())}
    assert documents["ConfigMap"]["data"] == {"recipe.toml": recipe.read_text()}
    pod = documents["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"][1:] == ["qdist", "/etc/qdist/recipe.toml", "--gpus=8"]
    assert {"name": "RUN", "value": "/qdist/runs/mine"} in pod["containers"][0]["env"]
    assert documents["Job"]["metadata"]["name"] == "my-recipe"


def test_the_file_of_a_job_is_written_with_what_submits_it(tmp_path: Path, schedulers: Path) -> None:
    for words, said in (
        (SLURM, "sbatch OUT"),
        (KUBERNETES, "kubectl create -f OUT"),
        (SKYPILOT, "sky launch --yes --detach-run --cluster guanaco-65b --secret QDIST_TOKEN OUT"),
    ):
        out = tmp_path / f"job.{words[0]}"
        result = qdist(*words, "--out", str(out))
        assert (result.exit_code, result.stdout) == (0, f"{out}: {said.replace('OUT', str(out))}\n")
        assert "guanaco-65b" in out.read_text()
    assert list(schedulers.glob("*.words")) == []


def test_a_run_on_named_cards_is_planned_first(schedulers: Path) -> None:
    result = qdist(*SKYPILOT[:6], "--gpu-name", "RTX 4090", "--gpu-memory", "24GiB", *BATCH, "--dry-run")
    assert (result.exit_code, yaml.safe_load(result.stdout)["resources"]) == (0, {"accelerators": "RTX4090:8"})
    assert "model    llama-65b" in result.stderr
    refused = qdist(*SLURM, "--gpu-name", "RTX 4090", *BATCH, "--placement", "replicate")
    assert (refused.exit_code, "needs" in refused.stderr) == (2, True)
    assert list(schedulers.glob("*.words")) == []


def test_the_plan_of_a_job_is_that_of_all_of_its_nodes() -> None:
    result = qdist(*SLURM, "--gpu-name", "A100-SXM4-80GB", "--network", "25Gbit", *BATCH, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "--network" not in result.stdout
    said = {line.split()[0]: line for line in result.stderr.splitlines() if line[:1].isalpha()}
    assert "4 nodes x 8 GPUs" in said["ranks"]
    assert "25 Gbit/s" in said["network"]
    refused = qdist(*SLURM, "--gpu-name", "A100-SXM4-80GB", "--dry-run")
    assert "global_batch=16 cannot be spread over 32 ranks" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("slurm", "guanaco-66b", "--nodes", "2"), "no recipe 'guanaco-66b'"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--set", "lora.ranks=2"), "unknown setting"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--bits", "5"), "bits"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--model", "lama-7b"), "lama-7b"),
        (("slurm", "guanaco-65b", "--nodes", "0"), "--nodes 0: a run has 1 to 1,024 nodes"),
        (("slurm", "guanaco-65b", "--nodes", "two"), "--nodes 'two' is neither a number nor MIN:MAX"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--network", "25Gbit"), "--network is for the plan of the nodes"),
        (("slurm", "guanaco-65b", "--nodes", "1", "--gpu-name", "A100", "--network", "25Gbit"), "for one machine"),
        (("slurm", "guanaco-65b"), "missing option '--nodes'"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--name", "A B"), "'A B' is not a name for a job"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--partition", "a b"), "cannot stand in a job script"),
        (("slurm", "guanaco-65b", "--nodes", "2", "--image", "x"), "--image is not a flag"),
        (("kubernetes", "guanaco-65b", "--nodes", "2"), "missing option '--image'"),
        (("lsf", "guanaco-65b", "--nodes", "2"), "lsf"),
    ],
)
def test_what_cannot_be_is_refused_in_two_lines(words: tuple[str, ...], said: str, schedulers: Path) -> None:
    result = qdist(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "  try: " in result.stderr
    assert list(schedulers.glob("*.words")) == []


def test_a_scheduler_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for words, name in ((SLURM, "sbatch"), (KUBERNETES, "kubectl"), (SKYPILOT, "sky")):
        result = qdist(*words)
        assert (result.exit_code, f"{name} is not on the PATH of this machine" in result.stderr) == (2, True)
        assert "try: --dry-run, or --out FILE" in result.stderr


def test_what_is_planned_before_is_the_run_on_all_its_nodes(schedulers: Path) -> None:
    words = ("slurm", "guanaco-65b", "--nodes", "2:4", "--gpus", "8", "--gpu-name", "H200", "--dry-run")
    result = qdist(*words, "--batch-size", "64")
    assert (result.exit_code, "4 nodes x 8 GPUs" in result.stderr) == (0, True)
    refused = qdist(*words, "--batch-size", "16")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "global_batch=16 cannot be spread over 32 ranks" in refused.stderr
