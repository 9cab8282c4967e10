"""The token of a run that SLURM starts: if the user made none, the first node leaves one on the shared disk."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qdist.core.errors import RunError, SpecError
from qdist.core.nodes.job import TOKEN, TOKEN_FILE
from qdist.core.nodes.places import Place
from qdist.host.nodes.token import new_token, read_token

_PATIENCE_S = 60.0
"""Seconds to wait for the first node's token: the nodes of a job begin at different moments."""
_AGAIN_S = 0.5
_MAKE = f"export {TOKEN}=$(openssl rand -hex 16) before srun"


@contextmanager
def token_of(
    run: Path,
    place: Place,
    environ: Mapping[str, str],
    *,
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """The run's token. Under SLURM the first node leaves one for its user's other nodes beside the run's folder.

    That file is removed at the end of the first node's run.
    Raises SpecError if there is no token.
    """
    if environ.get(TOKEN) or environ.get(TOKEN_FILE) or place.of != "SLURM":
        yield read_token(environ)
        return
    file = run.parent / f".{run.name}.{environ.get('SLURM_JOB_ID', 'job')}.token"
    if place.node != 0:
        _await(file, say=say, wait=wait)
        yield read_token({TOKEN_FILE: str(file)})
        return
    _leave(file)
    try:
        yield read_token({TOKEN_FILE: str(file)})
    finally:
        file.unlink(missing_ok=True)


def _leave(file: Path) -> None:
    """Write a new token where only this user can read it; one that is there already, of a requeued job, stays."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, new_token().encode() + b"\n")
            with contextlib.suppress(FileExistsError):
                os.link(beside, file)
        finally:
            os.close(descriptor)
            beside.unlink()
    except OSError as error:
        raise RunError(f"the run's token cannot be written to {file}: {error.strerror}", try_=_MAKE) from error


def _await(file: Path, *, say: Callable[[str], None], wait: Callable[[float], None]) -> None:
    """Wait until the first node has left its token. Raises SpecError if it does not."""
    waited = 0.0
    while not _is_there(file):
        if not waited:
            say(f"waiting for the first node's token in {file.parent}, for {_PATIENCE_S:.0f} s at most")
        if waited >= _PATIENCE_S:
            raise SpecError(
                f"no token for the run: {TOKEN} is not set, and the first node left none in {file.parent} in "
                f"{waited:.0f} s (is it on a disk that the nodes share?)",
                try_=_MAKE,
            )
        wait(_AGAIN_S)
        waited += _AGAIN_S


def _is_there(file: Path) -> bool:
    # A network disk may go on saying that one name is not there; it lists the folder anew.
    with contextlib.suppress(OSError):
        return file.name in os.listdir(file.parent)
    return False
