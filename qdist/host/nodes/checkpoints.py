"""How does a whole checkpoint get from one node to another? Complete, or not at all."""

import os
import secrets
import shutil
from pathlib import Path

import msgspec

from qdist.core.errors import JobError, RunError
from qdist.host.files import publish_folder, replace_folder, require_space
from qdist.host.nodes.remote import Files
from qdist.host.nodes.serving import place_in
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir

DONE = "DONE"


class _Closed(msgspec.Struct, frozen=True):
    """What DONE says of each file: its bytes, and two sums that who loads it checks."""

    files: dict[str, tuple[int, int, int]]


def fetch_checkpoint(files: Files, run: RunDir, step: int) -> Path:
    """Copy a checkpoint to here, unless it is here.

    Raises RunError if the other node does not have all of it, JobError if it cannot be written.
    """
    final = run.checkpoint(step)
    if (final / DONE).is_file():
        return final
    listed = files.list(_named(run, final))
    if f"{_named(run, final)}/{DONE}" not in listed:
        raise RunError(f"the other node has no complete checkpoint of step {step}", try_=run.last_saved())
    require_space(
        run.checkpoints, sum(listed.values()), purpose=f"the checkpoint of step {step}", try_="make room there"
    )
    # Named as those of `save`, which removes what a killed process leaves.
    beside = run.checkpoints / f".{final.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for path in listed:
            files.fetch(path, place_in(beside, path.removeprefix(f"{_named(run, final)}/")))
        _require_complete(beside, step)
        if final.exists():
            replace_folder(beside, final, aside=beside.with_name(f"{beside.name}0"))
        else:
            publish_folder(beside, final)
    except OSError as error:
        raise JobError(f"the checkpoint of step {step} cannot be written: {error}", try_="make room there") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def send_checkpoint(files: Files, run: RunDir, step: int) -> None:
    """Copy a checkpoint to the other node, unless it is there. Raises RunError if it is not complete here."""
    final = run.checkpoint(step)
    named = _named(run, final)
    if f"{named}/{DONE}" in files.list(named):
        return
    if not (final / DONE).is_file():
        raise RunError(f"{final} has no {DONE}: it was not finished", try_=run.last_saved())
    beside = f"{run.checkpoints.name}/.{final.name}.{secrets.randbelow(10**9)}"
    for path in sorted(path for path in final.iterdir() if path.is_file()):
        files.put(f"{beside}/{path.name}", path)
    files.publish(beside, named)


def _require_complete(folder: Path, step: int) -> None:
    """Raise RunError unless every file is as long as DONE says; an empty one is of a qdist that recorded no sums."""
    if not (folder / DONE).stat().st_size:
        return
    for name, (size, *_) in read_typed(folder / DONE, _Closed, RunError).files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise RunError(
                f"of {name} of the checkpoint of step {step}, {found:,} of {size:,} bytes came", try_="the same again"
            )


def _named(run: RunDir, folder: Path) -> str:
    return str(folder.relative_to(run.path))
