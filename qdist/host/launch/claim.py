"""Claims a run directory for one launch: locks it, checks it again, clears it, and only then writes to it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from qdist.core.errors import JobError, RunError
from qdist.core.planning.plan import digest
from qdist.core.text import resuming
from qdist.host.files import is_full, locked, sweep, write_atomic
from qdist.host.launch.prepare import Launch
from qdist.host.launch.refusals import ELSEWHERE, refuse_used
from qdist.host.run.rundir import ENDED, LOCK, RESULT, STOP, RunDir, free_name, of_ranks
from qdist.host.run.state import sign


class Claim(NamedTuple):
    """A run directory with its files written, locked so that no other launch starts ranks in it."""

    job: Launch
    lock: int
    """Descriptor of the lock: a process that inherits it holds the run as well."""
    launch: str
    """The id of this launch."""

    def is_lost(self) -> bool:
        """Whether the run directory was removed, moved or replaced since."""
        try:
            there = os.stat(self.job.run.path / LOCK)
        except OSError as error:
            # A network disk that does not answer for a moment has lost nothing.
            return error.errno in (errno.ENOENT, errno.ENOTDIR)
        return not os.path.samestat(there, os.fstat(self.lock))


@contextmanager
def claimed(job: Launch) -> Iterator[Claim]:
    """Lock a job's run directory and write its files; refuses if another launch has changed it in the meantime.

    A name that qdist chose is created, and the next one taken where another launch was faster.
    Raises RunError if the run is another's by now, or cannot be written to; JobError where the disk is full. What
    this call created is gone again then.
    """
    job, created = _with_folder(job)
    with ExitStack() as stack:
        try:
            busy = f"{job.run.path} is being trained by another process"
            lock = stack.enter_context(locked(job.run.path / LOCK, busy=busy))
            _look_again(job)
            clear(job.run)
            (job.run.path / RESULT).unlink(
                missing_ok=True
            )  # of a run that goes on; before its plan tells of more steps
            launch = sign(lock)
            write_files(job.run, job.files)
        except OSError as error:
            if created:
                shutil.rmtree(job.run.path, ignore_errors=True)
            raise _unwritable(job.run, error) from error
        yield Claim(job, lock, launch)


def tidy(run: RunDir) -> None:
    """Remove what a killed launch left in a run that has ended; does nothing if the run is locked or read-only."""
    with contextlib.suppress(RunError, OSError), locked(run.path / LOCK, busy="held"):
        clear(run)


def write(job: Launch) -> RunDir:
    """Write a run without starting it; returns its directory. Raises as `claimed` does."""
    with claimed(job) as own:
        return own.job.run


def _with_folder(job: Launch) -> tuple[Launch, bool]:
    """The job with its directory created, and whether it was created for it."""
    try:
        job.run.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                job.run.path.mkdir()
            except FileExistsError:
                if not job.stem:
                    return job, False
                job = job._replace(run=RunDir(free_name(job.run.path.parent, job.stem)))
            else:
                return job, True
    except OSError as error:
        raise _unwritable(job.run, error) from error


def _unwritable(run: RunDir, error: OSError) -> RunError:
    kind = JobError if is_full(error) else RunError
    return kind(f"{run.path} cannot be written: {error.strerror}", try_=ELSEWHERE)


def _look_again(job: Launch) -> None:
    """Raise RunError if another launch has written the plan since it was checked."""
    run = job.run
    if not job.resumes:
        refuse_used(run, held=True)
    elif (result := run.result()) is not None and job.plan.steps <= result.get("steps", job.plan.steps):
        raise RunError(f"another launch has finished {run.path} meanwhile", try_="its adapter")
    elif digest(run.plan()) != job.resumes:
        raise RunError(f"another launch has gone on with {run.path} meanwhile", try_=resuming(run.path))


def clear(run: RunDir) -> None:
    """Remove the record of how an earlier launch ended, and files that a kill left half-written."""
    for leftover in (STOP, ENDED):
        (run.path / leftover).unlink(missing_ok=True)
    for folder in (run.path, run.checkpoints, run.pulses):
        sweep(folder)
    for path in of_ranks(run.pulses, ".new"):
        path.unlink(missing_ok=True)
    for path in run.path.glob(".rehearsal.*"):
        shutil.rmtree(path, ignore_errors=True)


def write_files(run: RunDir, files: Mapping[str, str]) -> None:
    """Write a run's files, the plan last: a directory without a plan is not a run."""
    for folder in (run.events, run.logs, run.checkpoints):
        folder.mkdir(exist_ok=True)
    for name, text in files.items():
        write_atomic(run.path / name, text)
