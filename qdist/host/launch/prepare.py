"""Turns a spec into a planned run: checks what must exist, refuses, prepares and plans."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from qdist.core.errors import SpecError
from qdist.core.machine.cluster import Cluster
from qdist.core.model.families import require_library_class
from qdist.core.model.gptq import of_run
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.fill import MicroBatch
from qdist.core.planning.plan import DataFacts, Plan, Prepared, Source, digest
from qdist.core.planning.planner import make_plan
from qdist.core.planning.render import (
    ACCELERATE_FILE,
    DEEPSPEED_FILE,
    accelerate_config,
    deepspeed_config,
    deepspeed_policy,
    launch_script,
)
from qdist.core.planning.resources import count_of
from qdist.core.spec.recipe import to_toml
from qdist.core.spec.run_spec import RunSpec, flatten, resolve
from qdist.core.spec.sections import Data
from qdist.host import tasks, templates
from qdist.host.data import stdin
from qdist.host.data.chat_templates import find_template
from qdist.host.data.sources import changed_sources, check_data, data_notes, is_local, split_sources
from qdist.host.launch.refusals import (
    of_the_same,
    refuse_done,
    refuse_other_files,
    refuse_small_disk,
    refuse_tasks,
    refuse_unwritable,
    refuse_unwritable_cache,
    refuse_used,
)
from qdist.host.launch.survey import Survey, Work, counted, expected, require_room, survey, tokenizing
from qdist.host.launch.trackers import refuse_missing
from qdist.host.machine import probe
from qdist.host.machine.recurrence import fla_problem
from qdist.host.run import calibration
from qdist.host.run.rundir import MACHINE, PLAN, RunDir, free_name
from qdist.host.sources import cache
from qdist.host.sources.adapters import find_adapter, require_fit, require_start, start_of
from qdist.host.sources.facts import facts_of
from qdist.host.sources.model_folder import fingerprint, require_same_tensors
from qdist.host.sources.models import known_shape

RESUMABLE = frozenset((
    "run", "gpus", "placement", "gpus_per_group", "split.schedule", "split.offload_layers", "micro_batch",
    "pack", "graphs", "max_memory", "trackers", "liger", "zero.stage", "zero.offload", "optim.reduce_dtype",
    "train.checkpointing", "train.eval_steps", "train.save_steps", "train.keep", "train.answers",
    "train.verify_steps", "train.stuck_seconds", "train.tasks", "train.best", "train.patience",
))  # fmt: skip
"""Settings that may change on resume, because they do not affect what a step computes, beyond its rounding."""


_RUNS = Path("runs")
_LONGEST_STEM = 60
"""Characters of the data's names in the name of a run."""


class Launch(NamedTuple):
    """A planned run and the files that its directory will hold."""

    run: RunDir
    plan: Plan
    files: dict[str, str]
    notes: tuple[str, ...]
    stem: str = ""
    """Prefix of the run's name if qdist chose it; empty if the user did."""
    resumes: str = ""
    """Digest of the plan that this one replaces; empty for a new run."""


class Preview(NamedTuple):
    """What a launch would do, determined without doing any of it."""

    run: RunDir
    job: Launch | None
    """None for a model whose shape is known only once it is downloaded."""
    work: tuple[Work, ...] = ()
    """Preparation steps before the ranks start, and which are done already."""
    knows_steps: bool = True
    """Whether the plan's step count is exact: epochs cannot be counted over data on a hub."""


class Asked(NamedTuple):
    """One launch: the request, and the machine it is planned for, probed once."""

    run: RunDir
    spec: RunSpec
    here: Cluster
    old: Plan | None = None
    """The plan that a resumed run continues."""


def prepare(spec: RunSpec) -> Launch:
    """Plan a new run; writes nothing but caches.

    Raises SpecError, ModelError, DataError or PlanError for what the user can put right.
    """
    return _prepared(new_run(spec))


def preview(spec: RunSpec) -> Preview:
    """The first half of `prepare`: existing files are inspected, the rest is estimated.

    Writes nothing, but for what standard input says, which cannot be read twice.

    Raises as `prepare` does.
    """
    asked = new_run(spec)
    spec = asked.spec
    if spec.load_format == "dummy":
        return Preview(asked.run, job_of(asked, _synthetic(spec)))
    found = _surveyed(asked)
    before = cache.remembered(spec, found.folder) if found.folder else None
    records = None if before else counted(spec)
    work = (*found.work, *tokenizing(spec, records, before))
    if before:
        return Preview(asked.run, job_of(asked, before), work)
    if found.facts is None or found.source is None:
        return Preview(asked.run, None, work)
    data = None if records is None else expected(spec, found.facts, records)
    known = data is not None or spec.steps is not None
    estimate = Prepared(source=found.source, data=data, notes=_estimate_notes(spec, found, data))
    return Preview(asked.run, job_of(asked if known else _one_step(asked), estimate), work, known)


def prepare_resume(run: RunDir, changes: Mapping[str, Any]) -> Launch:
    """Plan the rest of a run, or more steps of a finished one, for this machine as it is now.

    Its model, data and arithmetic stay as they were.

    changes: settings given again, nested. Raises SpecError when one of them would make it another run, RunError when
    its model or data are others now, or it has done its steps.
    """
    return _prepared(resumed(run, changes))


def preview_resume(run: RunDir, changes: Mapping[str, Any]) -> Preview:
    """What `prepare_resume` would do; see `preview`."""
    asked = resumed(run, changes)
    kept = _kept(asked)
    if kept is not None:
        return Preview(run, job_of(asked, kept))
    found, before = _surveyed(asked), _of(run.plan())
    tokenized = before if before.data and os.path.exists(before.data.path) else None
    work = (*found.work, *tokenizing(asked.spec, None, tokenized))
    return Preview(run, job_of(asked, before), work)


def _prepared(asked: Asked) -> Launch:
    """The common part of both kinds of launch: reuse what is prepared, make the rest, and plan all of it."""
    return job_of(asked, prepared_for(asked))


def prepared_for(asked: Asked) -> Prepared:
    """What a launch needs first: what is prepared already, or made now. Raises as `prepare` does."""
    refuse_unwritable(asked.run, probe=True)
    if asked.old is None and asked.spec.load_format == "dummy":
        return _synthetic(asked.spec)
    return _kept(asked) or _made(asked)


def _kept(asked: Asked) -> Prepared | None:
    """What a resumed run was prepared from, if it is complete and unchanged. Raises RunError if it is not."""
    old = asked.old
    if old is None:
        return None
    before = _of(old)
    if not cache.all_there(before):
        refuse_other_files(old, asked.run)
        return None
    require_same_tensors(old.source, before.source.packed, run=str(asked.run.path))
    return before


def _made(asked: Asked) -> Prepared:
    """Convert, repair, tokenize and pack in a child process. Raises RunError if a resumed run would get other data."""
    found = _surveyed(asked)
    refuse_unwritable_cache(probe=True)
    if asked.old is None and (known := _known(asked.spec, found)):
        return known
    prepared = tasks.prepare(asked.spec, device=asked.here.device)
    with contextlib.suppress(OSError):  # a cache that has no room for a note fails no run
        cache.remember(asked.spec, prepared)
    if asked.old:
        prepared = of_the_same(asked.old, prepared, asked.run)
        require_same_tensors(asked.old.source, prepared.source.packed, run=str(asked.run.path))
    return prepared


def _known(spec: RunSpec, found: Survey) -> Prepared | None:
    """What preparing would only find to be there: that takes a process which imports torch and transformers.

    None for what a hub may have anew, and for weights that differ from those which were prepared.
    """
    from_hub = any(work.action == "fetch" for work in found.work) or not is_local(spec.data)
    if found.folder is None or from_hub:
        return None
    known = cache.remembered(spec, found.folder, to_the_letter=True)
    if known is None or known.source.original != fingerprint(found.folder):
        return None
    source = known.source
    return known if source.fingerprint in ("", fingerprint(Path(source.packed))) else None


def _of(old: Plan) -> Prepared:
    return Prepared(source=old.source, data=old.data, notes=_changed_since(old))


def new_run(spec: RunSpec, here: Cluster | None = None) -> Asked:
    """A new run, whose directory need not exist yet. Raises RunError if there is something in the way.

    here: what it is planned for; by default this machine.
    """
    if not spec.model:
        raise SpecError("no model was named", try_="--model smollm2-135m")
    spec = msgspec.structs.replace(spec, data=stdin.kept(spec.data))
    run = RunDir(spec.run) if spec.run else RunDir(free_name(_RUNS, _stem(spec)))
    refuse_used(run)
    refuse_unwritable(run)
    refuse_missing(spec.trackers)
    refuse_tasks(spec)
    if spec.adapter:
        find_adapter(spec.adapter)
    return Asked(run, spec, here or probe.cluster())


def resumed(run: RunDir, changes: Mapping[str, Any], here: Cluster | None = None) -> Asked:
    """The rest of an existing run. here: what it is planned for; by default this machine."""
    old = run.plan()
    before = msgspec.to_builtins(old.spec)
    if "steps" in changes or "epochs" in changes:  # two ways to say how long: the newer one counts
        before |= {"steps": None, "epochs": None}
    spec = resolve(before, changes)
    was, now = flatten(old.spec), flatten(spec)
    for key in was:
        if was[key] != now[key] and not _resumable(key, spec):
            raise SpecError(
                f"{run.path} was started with {key}={_shown(was[key])}, not {_shown(now[key])}; a resumed run keeps it"
                + _because(key, spec),
                try_=f"leave {key} out, or start a new run",
            )
    refuse_unwritable(run)
    refuse_missing(spec.trackers)
    refuse_tasks(spec)
    return Asked(run, spec, here or probe.cluster(), old)


def _changed_since(old: Plan) -> tuple[str, ...]:
    """Notes on data files that have changed since the run tokenized them."""
    data = old.data
    names = changed_sources(old.spec.data, data) if data and os.path.exists(data.path) else ()
    if data is None or not names:
        return ()
    have = "has" if len(names) == 1 else "have"
    return (
        f"{' and '.join(names)} {have} changed since: the run goes on with the {data.samples:,} samples it was started "
        "with",
    )


def job_of(asked: Asked, prepared: Prepared) -> Launch:
    """The planned run and its files. Raises as `prepare` does."""
    run, spec, here, old = asked
    facts = facts_of(prepared.source.config, name=spec.model, code=prepared.source.own_code)
    plan = _started(asked, _planned(asked, prepared.source, facts, prepared.data))
    refuse_small_disk(plan, run)
    files = {
        "recipe.toml": to_toml(msgspec.structs.replace(spec, run=None)),
        MACHINE: msgspec.json.format(msgspec.json.encode(here), indent=1).decode() + "\n",
        "versions.json": json.dumps(probe.versions(), indent=2) + "\n",
    }
    if plan.engine == "deepspeed":
        config = deepspeed_config(plan, templates.policy(deepspeed_policy(plan)))
        files[DEEPSPEED_FILE] = json.dumps(config, indent=2) + "\n"
    files[ACCELERATE_FILE] = json.dumps(accelerate_config(plan), indent=2) + "\n"
    files["launch.sh"] = launch_script(plan, python=sys.executable)
    files[PLAN] = msgspec.json.format(msgspec.json.encode(plan), indent=1).decode() + "\n"
    begins = plan.start.path if plan.start and not run.checkpoint_steps() else ""
    notes = (f"the adapter begins as that in {begins}",) if begins else ()
    stem, resumes = ("", digest(old)) if old else ("" if spec.run else _stem(spec), "")
    return Launch(run, plan, files, prepared.notes + notes, stem, resumes)


def _started(asked: Asked, plan: Plan) -> Plan:
    """The plan with the adapter it starts from. Raises RunError if that is gone or no steps are left."""
    run, old = asked.run, asked.old
    if old is None:
        return msgspec.structs.replace(plan, start=start_of(plan))
    refuse_done(plan, run)
    if old.start and not run.checkpoint_steps():
        require_start(old.start, run)
    return msgspec.structs.replace(plan, start=old.start)


def _surveyed(asked: Asked) -> Survey:
    """What exists of a run's model, once all errors visible in the recipe and the file system have been raised."""
    spec = asked.spec
    if not spec.data.path:
        raise SpecError("no data was named", try_="--data FILE, a hub id, or --data demo")
    check_data(spec.data)
    if spec.data.template is not None:
        find_template(spec.data.template)
    count_of(spec, asked.here)
    refuse_unwritable_cache()
    found = survey(spec)
    _rehearse(asked, found)
    require_room(spec, found.work)
    return found


def _rehearse(asked: Asked, found: Survey) -> None:
    """Plan with the shortest possible data, so that impossible runs fail before a download or conversion."""
    if found.source is None or found.facts is None:
        return
    shortest = DataFacts(path="", samples=2, train_samples=1, held_out_samples=1, tokens=2, longest=8)
    plan = _planned(asked._replace(old=None), found.source, found.facts, shortest)
    if asked.old is None:
        require_fit(plan)
    refuse_small_disk(plan, asked.run)


def _estimate_notes(spec: RunSpec, found: Survey, data: DataFacts | None) -> tuple[str, ...]:
    """Notes on where the shape is from, what is left out of a folder, and what tokenizing will determine."""
    left_out = data_notes(spec.data)
    if data is None:
        open_ = f"steps and the longest sample are known once {spec.data.path} is fetched and tokenized"
    else:
        guess = f"{data.samples:,} samples of {data.longest} tokens"
        open_ = f"steps and the longest sample are known once the data are tokenized: this is for {guess}"
    return tuple(filter(None, (found.note, *left_out, open_)))


def _one_step(asked: Asked) -> Asked:
    return asked._replace(spec=msgspec.structs.replace(asked.spec, steps=1, epochs=None))


def _planned(asked: Asked, source: Source, facts: ModelFacts, data: DataFacts | None) -> Plan:
    """The plan for this machine, corrected by what earlier runs here have taught."""
    spec, here = asked.spec, asked.here
    return make_plan(
        spec,
        source,
        facts,
        here,
        data,
        has_liger=find_spec("liger_kernel") is not None,
        no_fla=fla_problem(here),
        usual=MicroBatch(asked.old.micro_batch, asked.old.packed) if asked.old else None,
        correction=calibration.correction_for(here, world_size=spec.gpus, bits=spec.bits, compute=spec.compute),
    )


def _synthetic(spec: RunSpec) -> Prepared:
    """Random weights and random tokens, which need no conversion or tokenizing."""
    if spec.data.path:
        raise SpecError(f"random weights train on random tokens, not on {spec.data.path!r}", try_="leave --data out")
    if spec.data != Data():
        now, usual = flatten(spec), flatten(RunSpec())
        keys = [key for key in usual if key.startswith("data.") and now[key] != usual[key]]
        raise SpecError(
            f"random weights train on random tokens, of which {' and '.join(keys)} say nothing",
            try_=f"leave {' and '.join(keys)} out",
        )
    if spec.train.answers or spec.new_tokens or spec.train.tasks:
        raise SpecError("train.answers, train.tasks and new_tokens need a tokenizer, and random weights have none")
    config, _, _, code = known_shape(spec.model, spec.trust_remote_code)
    require_library_class(config, name=spec.model, trusted=bool(code))
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=of_run(spec, config), own_code=code)
    return Prepared(source=source, data=None)


def _resumable(key: str, spec: RunSpec) -> bool:
    """Whether a run may resume with another value; the length only if the learning rate does not depend on it."""
    return key in RESUMABLE or (key in ("steps", "epochs") and spec.optim.schedule == "constant")


def _because(key: str, spec: RunSpec) -> str:
    """Why a run's length is fixed: ': its ...'; empty for settings that need no explanation."""
    return f": its {spec.optim.schedule} learning rate ends with them" if key in ("steps", "epochs") else ""


def _stem(spec: RunSpec) -> str:
    model = re.sub(
        r"[^\w.-]+", "-", Path(spec.model).stem if spec.model.lower().endswith(".gguf") else Path(spec.model).name
    )
    stems = "-".join(Path(part.path).stem for part in split_sources(spec.data.path))
    data = re.sub(r"[^\w.-]+", "-", stems)[:_LONGEST_STEM] if spec.data.path else "dummy"
    return f"{model}-{spec.method}-{data}".lower()


def _shown(value: object) -> str:
    return "auto" if value is None else json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
