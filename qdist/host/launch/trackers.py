"""Are the packages of the trackers that a run asks for installed?"""

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

from qdist.core.errors import MachineError

PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio",),
}
"""Tracker -> the packages of which one will do, the one to install first. mlflow-skinny talks to servers alone."""


def refuse_missing(
    trackers: Iterable[str],
    *,
    version_of: Callable[[str], str] = metadata.version,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Raise MachineError for the first tracker without its package: Accelerate would drop it without a word.

    Metadata is asked, not the import system, for which a folder `./wandb` that holds curves is a package.
    """
    for tracker in trackers:
        package, *others = PACKAGES[tracker]
        if "MLFLOW_TRACKING_URI" not in environment:
            others = []
        if not any(_installed(each, version_of) for each in (package, *others)):
            raise MachineError(
                f"trackers={tracker} needs the package {package}, which is not installed",
                try_=f"pip install {package}, or leave {tracker} out of trackers",
            )


def _installed(package: str, version_of: Callable[[str], str]) -> bool:
    try:
        version_of(package)
    except metadata.PackageNotFoundError:
        return False
    return True
