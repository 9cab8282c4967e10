"""How does one type a change to what was asked?"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

Change = Mapping[str, Any]
"""Settings by dotted key, and flags of `qdist plan` that describe a machine: 'gpu_memory': '48GiB'. None leaves a
setting to the plan."""
Say = Callable[[Change], str]

MACHINE = ("gpu_memory", "gpu_name", "host_memory")
"""What `qdist plan` assumes of a machine. No settings: only its flags say it."""
_FLAGS = frozenset(("model", "method", "bits", "gpus", "placement", "gpus_per_group", "max_memory", *MACHINE))
"""Keys for which there is a flag."""
_REMARKS = {"train.answers": "(and qdist generate RUN afterwards)"}


def typed(key: str, value: object) -> str:
    """A setting as one types it: '--bits 4', '--set lora.r=16', '--placement auto'."""
    text = value_text(value)
    if key in _FLAGS:
        return f"--{key.replace('_', '-')} {shlex.quote(text)}"
    return f"--set {shlex.quote(f'{key}={text}')}"


def value_text(value: object) -> str:
    """The value of a setting as one types it."""
    if value is None or isinstance(value, bool):
        return {None: "auto", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


def flags(change: Change) -> str:
    """A change as one types it, after the command to which it is made."""
    words = [typed(key, value) for key, value in change.items()]
    return " ".join(words + [remark for key, remark in _REMARKS.items() if key in change])


def in_words(change: Change) -> str:
    """A change for someone who has the machine that the plan is for: another one has no flags."""
    own = flags({key: value for key, value in change.items() if key not in MACHINE})
    machine = []
    if "gpu_memory" in change:
        machine.append(f"GPUs of {spaced(change['gpu_memory'])}")
    if "host_memory" in change:
        host = change["host_memory"]
        machine.append(f"{spaced(host)} of host memory, which qdist plan --host-memory {host} assumes")
    return " with ".join(filter(None, (" and ".join(machine), own)))


def spaced(amount: str) -> str:
    """'48GiB' -> '48 GiB'."""
    return amount.replace("GiB", " GiB")
