"""Shells full of other launchers' variables: the same adapter, or a sentence, and never a hang.

    python -m bench.chaos.shells [--count 60] [--jobs 1]

Each trial draws three to twenty variables of torchrun, accelerate, DeepSpeed, SLURM, MPI and Python with values that
mean something to one of them, and launches; the adapter is compared with that of a clean shell. (PYTHONINSPECT is left
out: the Python that launches then shows its own end as a traceback, as it was asked to.)
"""

import hashlib
import re
import shutil
import subprocess
from typing import NamedTuple

from bench.chaos.ground import Ground, has_traceback, left, table
from bench.chaos.trials import Task, numbered

LONGEST_S = 150
_LISTED = """
PET_NNODES=2|1:4 PET_NPROC_PER_NODE=4|gpu PET_RDZV_BACKEND=static|etcd PET_RDZV_ENDPOINT=10.255.255.1:29400
PET_MASTER_ADDR=10.255.255.1 PET_MASTER_PORT=1 PET_NODE_RANK=1|3 PET_NO_PYTHON=1 PET_MODULE=0|1 PET_STANDALONE=0
PET_MAX_RESTARTS=3 PET_REDIRECTS=3 PET_TEE=3 PET_LOG_DIR=/nowhere/at/all PET_RUN_PATH=1 PET_START_METHOD=fork
PET_ROLE=x PET_LOCAL_RANKS_FILTER=9 PET_VIRTUAL_LOCAL_RANK=1 PET_NUMA_BINDING=node PET_SIGNALS_TO_HANDLE=SIGUSR2
TORCHELASTIC_RUN_ID=none|7 TORCHELASTIC_RESTART_COUNT=2 TORCHELASTIC_MAX_RESTARTS=3
TORCHELASTIC_ERROR_FILE=/nowhere/error.json TORCHELASTIC_USE_AGENT_STORE=True RANK=3|-1 LOCAL_RANK=5|-1 WORLD_SIZE=8|1
LOCAL_WORLD_SIZE=8 GROUP_RANK=1 ROLE_RANK=1 NODE_RANK=1 MASTER_ADDR=10.255.255.1 MASTER_PORT=1|abc CROSS_RANK=1
LOCAL_SIZE=8 ACCELERATE_USE_DEEPSPEED=true ACCELERATE_USE_FSDP=true ACCELERATE_MIXED_PRECISION=fp16|fp8
ACCELERATE_DYNAMO_BACKEND=INDUCTOR ACCELERATE_GRADIENT_ACCUMULATION_STEPS=7 ACCELERATE_TORCH_DEVICE=cuda:9
ACCELERATE_USE_CPU=false ACCELERATE_USE_MEGATRON_LM=true ACCELERATE_USE_PARALLELISM_CONFIG=true
PARALLELISM_CONFIG_TP_SIZE=2 ACCELERATE_DEEPSPEED_ZERO_STAGE=3 ACCELERATE_DEEPSPEED_CONFIG_FILE=/nowhere.json
FSDP_OFFLOAD_PARAMS=true FSDP_CPU_RAM_EFFICIENT_LOADING=true FORK_LAUNCHED=1 OMPI_COMM_WORLD_SIZE=4
OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=3 PMI_SIZE=4 PMI_RANK=3 PMIX_RANK=3 MV2_COMM_WORLD_SIZE=4
MV2_COMM_WORLD_RANK=3 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=3 SLURM_NODEID=1 SLURM_NNODES=2 SLURM_JOB_ID=42
SLURM_JOB_NODELIST=node[1-2] SLURM_STEP_ID=0 DLTS_JOB_ID=1 AZ_BATCH_MASTER_NODE=10.255.255.1:6000
AZUREML_EXPERIMENT_ID=x DEEPSPEED_CONFIG=/nowhere.json PYTHONHASHSEED=7 PYTHONDONTWRITEBYTECODE=1
PYTHONOPTIMIZE=1 PYTHONUNBUFFERED=1 TRUST_REMOTE_CODE=1 CDPATH=/tmp ENV=/etc/passwd
"""
VARIABLES = {name: values.split("|") for name, _, values in (each.partition("=") for each in _LISTED.split())}


class Outcome(NamedTuple):
    """How a launch ended: same, a sentence, or a fault."""

    verdict: str
    variables: dict[str, str]


def main() -> None:
    """Count the verdicts."""
    found, end = numbered(trial, "bench.chaos.shells", __doc__ or "", count=60, of="Shells.")
    verdicts = [outcome.verdict for outcome in found]
    print(table(("verdict", "trials"), [(verdict, verdicts.count(verdict)) for verdict in sorted(set(verdicts))]))
    end(any(verdict not in ("the same adapter", "a sentence") for verdict in verdicts))


def trial(task: Task) -> Outcome:
    """A launch in a drawn shell."""
    ground, draw, number = task.ground, task.draw, task.number
    wanted = launched(ground, "clean", {})
    names = draw.sample(list(VARIABLES), draw.randint(3, 20))
    variables = {name: draw.choice(VARIABLES[name]) for name in names}
    found = launched(ground, f"shell{number:03d}", variables)
    verdict = "the same adapter" if found == wanted else found if found in FAULTS else "ANOTHER ADAPTER"
    print(f"{number:3} {verdict:17} {' '.join(f'{name}={value}' for name, value in variables.items())}", flush=True)
    return Outcome(verdict, variables)


FAULTS = ("a sentence", "A TRACEBACK", "A HANG", "PROCESSES LEFT", "NO SENTENCE")


def launched(ground: Ground, name: str, variables: dict[str, str]) -> str:
    """The adapter's SHA-256, or how else the launch ended."""
    run = ground.folder / name
    adapter = run / "adapter" / "adapter_model.safetensors"
    if not adapter.exists():
        command = ground.launch(run, "--load-format", "dummy", "--gpus", "2")
        try:
            done = subprocess.run(command, env=ground.environment(variables), stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=LONGEST_S, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return "A HANG"
        if has_traceback(done):
            return "A TRACEBACK"
        if done.returncode:
            print(done.stderr[-500:])
            return "a sentence" if re.search("^error: ", done.stderr, re.MULTILINE) else "NO SENTENCE"
        if left(str(run), 5):
            return "PROCESSES LEFT"
    found = hashlib.sha256(adapter.read_bytes()).hexdigest()
    if name != "clean":
        shutil.rmtree(run)
    return found


if __name__ == "__main__":
    main()
