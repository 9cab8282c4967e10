"""stub"""

import time
from qdist.core.nodes.facts import NodeFacts
from qdist.host.files import free_bytes, cache_path
from qdist.host.machine import probe
from qdist.host.run.rundir import RunDir

RUN_ID = "run_id"


def facts_here(job):
    run = RunDir(job.run)
    c = probe.cluster()
    rid = (run.path / RUN_ID).read_text() if (run.path / RUN_ID).exists() and run.exists() else ""
    return NodeFacts(
        node=job.node,
        name=job.name,
        address=job.address,
        versions=probe.versions(),
        clock=time.time(),
        free_bytes=free_bytes(run.path),
        cache_free_bytes=free_bytes(cache_path()),
        cluster=c,
        gpus=job.gpus or len(c.gpus) or 1,
        run_id=rid,
        steps=tuple(run.checkpoint_steps()),
    )
