"""From a spec to running ranks: prepare, plan, write the run directory, start, watch, report how it ended."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from qdist.core import demo
from qdist.core.errors import RunError, SpecError
from qdist.core.events import Event
from qdist.core.facts import ModelFacts, from_config, require_library_class
from qdist.core.gptq import of_run
from qdist.core.plan import DataFacts, Plan, Prepared, Source
from qdist.core.planner import make_plan
from qdist.core.recipe import to_toml
from qdist.core.render import (
    ACCELERATE_FILE,
    DEEPSPEED_FILE,
    accelerate_config,
    deepspeed_config,
    deepspeed_policy,
    launch_script,
)
from qdist.core.spec import RunSpec, flatten, resolve
from qdist.host import endings, lessons, modules, probe, templates
from qdist.host.checkpoints import gptq_of
from qdist.host.children import end_with_parent
from qdist.host.files import locked, write_atomic
from qdist.host.fingerprints import require_same_tensors
from qdist.host.follow import Follower
from qdist.host.records import check_source
from qdist.host.refusals import refuse_used
from qdist.host.rundir import ENDED, LOCK, MACHINE, PLAN, STOP, Ended, RunDir, free_name
from qdist.host.sources import find_shape, shape
from qdist.host.stuck import Watchdog
from qdist.host.targets import check_model
from qdist.host.trackers import refuse_missing

RESUMABLE = frozenset((
    "run", "gpus", "placement", "gpus_per_group", "split.schedule", "split.offload_layers", "micro_batch",
    "max_memory", "trackers", "liger", "zero.stage", "zero.offload",
    "train.checkpointing", "train.eval_steps", "train.save_steps", "train.keep", "train.answers",
    "train.verify_steps", "train.stuck_seconds",
))  # fmt: skip
"""Settings that may change when a run goes on: none of them changes what a step computes."""


Show = Callable[[list[Event]], None]


class Job(NamedTuple):
    """A planned run and the files that its directory will hold."""

    run: RunDir
    plan: Plan
    files: dict[str, str]
    notes: tuple[str, ...]


def prepare(spec: RunSpec) -> Job:
    """Plan a new run; writes nothing but caches.

    Raises SpecError, ModelError, DataError or PlanError for what the user can put right.
    """
    if not spec.model:
        raise SpecError("no model was named", try_="--model smollm2-135m")
    run = RunDir(spec.run) if spec.run else RunDir(free_name(Path("runs"), _stem(spec)))
    refuse_used(run)
    prepared = _synthetic(spec) if spec.load_format == "dummy" else _real(spec)
    return _job(run, spec, prepared)


def prepare_resume(run: RunDir, changes: Mapping[str, Any]) -> Job:
    """Plan the rest of a run, on what is here now; its model, data and arithmetic stay as they were.

    changes: settings given again, nested. Raises SpecError when one of them would make it another run.
    """
    old = run.plan()
    before = msgspec.to_builtins(old.spec)
    if "steps" in changes or "epochs" in changes:  # two ways to say how long: the newer one counts
        before |= {"steps": None, "epochs": None}
    spec = resolve(before, changes)
    was, now = flatten(old.spec), flatten(spec)
    for key in was:
        if was[key] != now[key] and not _resumable(key, spec):
            raise SpecError(
                f"{run.path} was started with {key}={_shown(was[key])}, not {_shown(now[key])}; a resumed run keeps it",
                try_=f"leave {key} out, or start a new run",
            )
    prepared = Prepared(source=old.source, data=old.data)
    for path in filter(
        None, (old.source.path, old.source.packed, old.source.tokenizer, old.data.path if old.data else "")
    ):
        if not os.path.exists(path):
            prepared = _real(spec)
            break
    require_same_tensors(old.source, prepared.source.packed, run=str(run.path))
    return _job(run, spec, prepared, usual_micro_batch=old.micro_batch)


def write(job: Job) -> None:
    """Create the run directory, the plan last: a directory without it is not a run.

    Raises RunError where it cannot be written; then what this call created is gone again.
    """
    is_new = not job.run.path.exists()
    try:
        job.run.path.mkdir(parents=True, exist_ok=True)
        for folder in (job.run.events, job.run.logs, job.run.checkpoints):
            folder.mkdir(exist_ok=True)
        for name, text in job.files.items():
            write_atomic(job.run.path / name, text)
    except OSError as error:
        if is_new:
            shutil.rmtree(job.run.path, ignore_errors=True)
        raise RunError(
            f"{job.run.path} cannot be written: {error.strerror}",
            try_="a --run folder that you may write to, on a disk with room",
        ) from error


def start(job: Job, *, show: Show, say: Callable[[str], None], recall: Show | None = None) -> None:
    """Start the ranks and stay until they have ended.

    show: called a few times a second with what the ranks said since.
    recall: called once before, with what they said before the run was resumed.
    say: called with a line for the user.
    Raises KeyboardInterrupt when the run was stopped and saved, JobError when a rank died.
    """
    run = job.run
    with locked(run.path / LOCK, busy=f"{run.path} is being trained by another process") as lock:
        for leftover in (STOP, ENDED):
            (run.path / leftover).unlink(missing_ok=True)
        follower = Follower(run.path)
        past = follower.new_events()
        if recall:
            recall(past)
        before = endings.log_lengths(run)
        with open(run.logs / "launcher.log", "ab") as log:
            ranks = subprocess.Popen(
                ["sh", str(run.path / "launch.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=end_with_parent,
            )
        watchdog = Watchdog(run, job.plan.spec.train.stuck_seconds)
        stopped, stuck = _watch(run, ranks, follower, watchdog, show, say)
        if run.result() is not None and ranks.returncode == 0:
            with contextlib.suppress(OSError):  # a cache that cannot be written to makes no run fail
                lessons.learn(run)
            return
        if stopped and not stuck and ranks.returncode in (0, -signal.SIGKILL):
            endings.note(run, Ended(state="stopped", time=time.time()))
            raise KeyboardInterrupt
        error = endings.stuck(run, stuck) if stuck else endings.died(run, before, ranks.returncode)
        endings.note(run, Ended(state="failed", message=error.message, try_=error.try_, time=time.time()))
        raise error


def _watch(
    run: RunDir,
    ranks: subprocess.Popen[bytes],
    follower: Follower,
    watchdog: Watchdog,
    show: Show,
    say: Callable[[str], None],
) -> tuple[bool, str]:
    """Follow the ranks to their end: whether the user or a scheduler asked them to stop, and who was stuck in what."""
    asked, stuck = 0, ""

    def ask(*_: int | FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            (run.path / STOP).touch()
            say("stopping after this step, with a checkpoint; a second Ctrl-C stops at once")
        else:
            os.killpg(ranks.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        readable = True
        while ranks.poll() is None:
            readable = readable and _shown_what_is_new(follower, show, say)
            if stuck := watchdog.stuck():
                break
            time.sleep(0.2)
        if readable:
            _shown_what_is_new(follower, show, say)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
        (run.path / STOP).unlink(missing_ok=True)
    return asked > 0, stuck


def _shown_what_is_new(follower: Follower, show: Show, say: Callable[[str], None]) -> bool:
    """Whether events can be read. Where they cannot, that is said, and the ranks go on unseen."""
    try:
        events = follower.new_events()
    except (RunError, OSError) as error:
        say(f"the run goes on, and is not shown any more: {error}")
        return False
    show(events)
    return True


def _job(run: RunDir, spec: RunSpec, prepared: Prepared, *, usual_micro_batch: int | None = None) -> Job:
    facts = from_config(prepared.source.config, name=spec.model)
    plan = _planned(spec, prepared.source, facts, prepared.data, usual_micro_batch=usual_micro_batch)
    files = {
        "recipe.toml": to_toml(msgspec.structs.replace(spec, run=None)),
        MACHINE: msgspec.json.format(msgspec.json.encode(probe.cluster()), indent=1).decode() + "\n",
        "versions.json": json.dumps(probe.versions(), indent=2) + "\n",
    }
    if plan.engine == "deepspeed":
        config = deepspeed_config(plan, templates.policy(deepspeed_policy(plan)))
        files[DEEPSPEED_FILE] = json.dumps(config, indent=2) + "\n"
    files[ACCELERATE_FILE] = json.dumps(accelerate_config(plan), indent=2) + "\n"
    files["launch.sh"] = launch_script(plan, python=sys.executable)
    files[PLAN] = msgspec.json.format(msgspec.json.encode(plan), indent=1).decode() + "\n"
    return Job(run, plan, files, prepared.notes)


def _real(spec: RunSpec) -> Prepared:
    if not spec.data:
        raise SpecError("no data was named", try_="--data FILE, a hub id, or --data demo")
    if spec.data != demo.NAME:
        check_source(spec.data)
    _rehearse(spec)
    return modules.prepare(spec)


def _rehearse(spec: RunSpec) -> None:
    """Plan with the shortest data there could be, so that what cannot work fails before a download or conversion."""
    check_model(spec.model)
    known = find_shape(spec.model)
    if known is None:  # only the hub can tell
        return
    config, facts, _ = known
    shortest = DataFacts(path="", samples=2, train_samples=1, held_out_samples=1, tokens=2, longest=8)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=gptq_of(spec, config))
    _planned(spec, source, facts, shortest)


def _planned(
    spec: RunSpec,
    source: Source,
    facts: ModelFacts,
    data: DataFacts | None,
    *,
    usual_micro_batch: int | None = None,
) -> Plan:
    """The plan for what is here, corrected by what earlier runs here have taught."""
    refuse_missing(spec.trackers)
    cluster = probe.cluster()
    return make_plan(
        spec,
        source,
        facts,
        cluster,
        data,
        has_liger=find_spec("liger_kernel") is not None,
        usual_micro_batch=usual_micro_batch,
        correction=lessons.correction_for(cluster, world_size=spec.gpus, bits=spec.bits),
    )


def _synthetic(spec: RunSpec) -> Prepared:
    """Random weights and random tokens: nothing to convert or tokenize."""
    if spec.data:
        raise SpecError(f"random weights train on random tokens, not on {spec.data!r}", try_="leave --data out")
    if spec.train.answers or spec.new_tokens:
        raise SpecError("train.answers and new_tokens need a tokenizer, and random weights have none")
    config, _ = shape(spec.model)
    require_library_class(config, name=spec.model)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=of_run(spec, config))
    return Prepared(source=source, data=None)


def _resumable(key: str, spec: RunSpec) -> bool:
    """Whether a run may go on with another value; the length only where the learning rate does not follow it."""
    return key in RESUMABLE or (key in ("steps", "epochs") and spec.optim.schedule == "constant")


def _stem(spec: RunSpec) -> str:
    model = re.sub(
        r"[^\w.-]+", "-", Path(spec.model).stem if spec.model.lower().endswith(".gguf") else Path(spec.model).name
    )
    data = re.sub(r"[^\w.-]+", "-", Path(spec.data).stem) if spec.data else "dummy"
    return f"{model}-{spec.method}-{data}".lower()


def _shown(value: object) -> str:
    return json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
