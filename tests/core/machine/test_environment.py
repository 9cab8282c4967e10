"""Which variables of a shell reach a process that is started?"""

import os
import subprocess

import pytest

from qdist.core.machine.environment import AGENT, FOREIGN, LAUNCH, for_children
from qdist.core.nodes.job import TOKEN, TOKEN_FILE

FOREIGNERS = [
    "PET_NNODES", "PET_NO_PYTHON", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "MV2_COMM_WORLD_SIZE",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONINSPECT",
]  # fmt: skip
OURS = ["NCCL_NVLS_ENABLE", "CUDA_VISIBLE_DEVICES", "HF_HOME", "MY_RANK", "RANKED", "SLURM_JOB_ID", "PETS", "XPET_A"]


@pytest.mark.parametrize("name", [*FOREIGNERS, LAUNCH, AGENT])
def test_what_another_launcher_said_is_left_out(name: str) -> None:
    assert name not in for_children({name: "2", "PATH": "/bin"})


@pytest.mark.parametrize("name", [TOKEN, TOKEN_FILE])
def test_no_rank_is_told_the_token_of_its_run(name: str) -> None:
    assert name not in for_children({name: "0123456789abcdef"})


@pytest.mark.parametrize("name", OURS)
def test_the_rest_is_passed_on(name: str) -> None:
    assert for_children({name: "2"})[name] == "2"


def test_the_shell_takes_away_the_same_names() -> None:
    """As launch.sh has it, with a value that has lines of its own."""
    environment = dict.fromkeys((*FOREIGNERS, *OURS), "2") | {"PATH": os.environ["PATH"], "TEXT": "a\nRANK=3\nb"}
    script = f"unset $(env | sed -nE 's/^({FOREIGN})=.*/\\1/p'); env"
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    left = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert left >= {*OURS, "TEXT"}
    assert not left & {*FOREIGNERS} - {"RANK"}
    assert "RANK=2" not in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("path", "root", "wanted"),
    [("", "", None), (":/a:", "", "/a"), ("/a::/b", "/here", "/a:/b:/here"), ("", "/here", "/here")],
)
def test_python_looks_for_modules_where_it_is_told_and_not_where_it_is_started(
    path: str, root: str, wanted: str | None
) -> None:
    environment = for_children({"PYTHONPATH": path}, root=root)
    assert environment.get("PYTHONPATH") == wanted
    assert environment["PYTHONSAFEPATH"] == "1"
