"""What this machine is as a node of a run; `python -m qdist.host.nodes.facts` prints it for a job on standard input."""

import hashlib
import os
import sys
import time
from functools import cache
from pathlib import Path

import msgspec

from qdist.core.errors import QdistError, RunError
from qdist.core.nodes.agreement import CODE, COMPUTING
from qdist.core.nodes.facts import NodeFacts
from qdist.core.nodes.job import AgentLine, NodeJob
from qdist.host.files import cache_path, free_bytes
from qdist.host.launch.refusals import refuse_unwritable, refuse_unwritable_cache
from qdist.host.machine import probe
from qdist.host.opening import read_text
from qdist.host.run.presence import is_held, lock_of
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.terminal import say_json

RUN_ID = "run_id"
"""File of a run directory that says which run it is, equal on all nodes."""


def facts_here(job: NodeJob) -> NodeFacts:
    """This machine, as it may take part in a run now; what it was in earlier generations is for its agent to add.

    Raises RunError or MachineError if the run directory, the cache or a GPU cannot be used.
    """
    run = RunDir(job.run)
    refuse_unwritable(run, probe=True)
    refuse_unwritable_cache(probe=True)
    cluster = probe.cluster()
    return NodeFacts(
        node=job.node,
        name=job.name,
        address=job.address,
        versions=computing_versions(),
        busy=is_held(lock_of(run, job.node)),
        clock=time.time(),
        free_bytes=free_bytes(run.path),
        cache_free_bytes=free_bytes(cache_path()),
        cluster=cluster,
        gpus=job.gpus or len(cluster.gpus) or 1,
        run_id=run_id_of(run),
        steps=tuple(run.checkpoint_steps()),
    )


def computing_versions() -> dict[str, str]:
    """Versions of what computes, and a digest of qdist's own files."""
    found = probe.versions(also=COMPUTING)
    return {name: found[name] for name in ("python", *COMPUTING) if name in found} | {CODE: _code_digest()}


@cache
def _code_digest() -> str:
    package, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(os.fsencode(file.relative_to(package)) + b"\0" + file.read_bytes())
    return digest.hexdigest()


def run_id_of(run: RunDir) -> str:
    """The id of the run in a directory; empty if there is none.

    A run of one machine has none until nodes take it over: then its first event stands for it, or its plan.
    """
    if not (run.path / PLAN).exists():
        return ""
    if (run.path / RUN_ID).exists():
        return read_text(run.path / RUN_ID, RunError).strip()
    return hashlib.sha256(_first_event(run) or (run.path / PLAN).read_bytes()).hexdigest()[:32]


def _first_event(run: RunDir) -> bytes:
    try:
        with open(run.event_file(0), "rb") as file:
            return file.readline()
    except FileNotFoundError:
        return b""


def main() -> None:
    """Print the facts of this machine as JSON, or an AgentLine with the error."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=NodeJob)
    try:
        say_json(msgspec.json.encode(facts_here(job)))
    except QdistError as error:
        say_json(msgspec.json.encode(AgentLine(kind="error", text=error.message, try_=error.try_)))


if __name__ == "__main__":
    main()
