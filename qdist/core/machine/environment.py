"""What of a shell's environment must not reach a process that is started here: another launcher's words about ranks."""

import re
from collections.abc import Mapping

_LAUNCHERS = (
    "PET", "TORCHELASTIC", "TORCH_ELASTIC", "ACCELERATE", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "OMPI", "PMI",
    "PMIX", "MV2", "MPI",
)  # fmt: skip
"""Beginnings of names: torchrun's defaults for its flags, what it tells its ranks, accelerate's settings, MPI's."""
_ALONE = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
    "FORK_LAUNCHED", "NPROC", "PYTHONINSPECT",
)  # fmt: skip
FOREIGN = f"({'|'.join(_LAUNCHERS)})_[A-Za-z0-9_]*|{'|'.join(_ALONE)}"
"""An extended regular expression, for Python and for sed, of the names of these variables: a plan says it all, and
torchrun, accelerate, DeepSpeed and transformers each would follow some of them instead."""
LAUNCH, AGENT = "QDIST_LAUNCH", "QDIST_AGENT"
"""The id of the launch that a rank is of; the process that started it."""
_SECRET = "QDIST_TOKEN(_FILE)?"
"""The token of a run of several nodes, which only their agents need: those are told it on their standard input."""
EVALUATE = "--evaluate"
"""Argument of the agent whose ranks evaluate instead of training."""


def for_children(environment: Mapping[str, str], *, root: str = "") -> dict[str, str]:
    """The environment of a Python that is started here. It imports nothing from the folder that it is started in.

    root: the folder of this package where nothing else leads to it, as in a checkout that is not installed.
    """
    left_out = re.compile(f"{FOREIGN}|{LAUNCH}|{AGENT}|{_SECRET}")
    kept = {name: value for name, value in environment.items() if not left_out.fullmatch(name)}
    # An empty entry, as of `PYTHONPATH=$PYTHONPATH:/more`, stands for the working directory.
    path = [entry for entry in kept.pop("PYTHONPATH", "").split(":") if entry] + [root] * bool(root)
    return {**kept, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": ":".join(path)} if path else {})}
