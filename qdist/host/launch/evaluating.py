"""Evaluates runs and models: a plan for ranks that only score, a directory for them, and what they found."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from qdist.core.composed import request_of
from qdist.core.data.reading import reading_of
from qdist.core.errors import JobError, RunError, SpecError
from qdist.core.evaluation.asked import Asked
from qdist.core.evaluation.job import FOUND, JOB, EvaluationJob, Subject
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.evaluation.results import Evaluation
from qdist.core.evaluation.words import KINDS, TaskWord, task_words
from qdist.core.machine.cluster import Cluster
from qdist.core.model.storage import Packing, quantized_as
from qdist.core.planning.plan import DataFacts, Plan, Prepared, Source
from qdist.core.planning.render import launch_script
from qdist.core.requests import Generate
from qdist.core.sampling import Sampling
from qdist.core.spec.run_spec import RunSpec, changed, nest, resolve
from qdist.core.spec.sections import OF_FILES, OF_MODELS
from qdist.core.text import command
from qdist.host import tasks
from qdist.host.evaluation.unscored import Model, evaluate_files, evaluate_models
from qdist.host.hub.card import write_card
from qdist.host.hub.push import MERGED
from qdist.host.launch.claim import claimed
from qdist.host.launch.evaluation_plan import evaluation_plan
from qdist.host.launch.local import LocalRanks
from qdist.host.launch.prepare import Launch
from qdist.host.launch.ranks import Backend, Show, attend
from qdist.host.launch.refusals import refuse_unreadable
from qdist.host.machine import probe
from qdist.host.opening import read_typed
from qdist.host.run.evaluations import add_evaluation
from qdist.host.run.rundir import PLAN, RunDir, free_name
from qdist.host.sources import cache
from qdist.host.sources.model_folder import require_same_tensors, stated
from qdist.host.sources.models import read_json
from qdist.host.sources.targets import adapter_step, check_gpus, check_target

_ANSWERED = ("gpus", "max_memory", "dtype", "trust_remote_code")
"""Settings that go with models that answer."""
_OWN = ("gpus", "placement", "gpus_per_group", "max_memory", "dtype", "trust_remote_code")
"""Settings that may be given for a run: those that say where its model lies, not what it is."""
_USED_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("window", "stride"), ("perplexity",)),
    **dict.fromkeys(("beside", "limit"), tuple(kind for kind in KINDS if kind not in OF_FILES)),
    "chat": ("lm",),
    **dict.fromkeys(("max_new_tokens", "batch"), OF_MODELS),
    **dict.fromkeys(msgspec.structs.asdict(JudgeSettings()), ("judge",)),
}
"""Kinds of tasks that use a flag, of those that not all do."""


class Group(NamedTuple):
    """Models on one backbone, to be evaluated by the same ranks."""

    spec: RunSpec
    subjects: tuple[Subject, ...]
    run: RunDir | None
    source: Source | None
    """The backbone, if it is prepared; None for a model that must be."""
    data: DataFacts | None
    """The run's, for how its records were worded, and what was held out."""


def evaluate(
    asked: Asked,
    settings: Mapping[str, Any],
    judge: JudgeSettings,
    *,
    show: Show,
    say: Callable[[str], None],
    backend: Backend = LocalRanks,
    answer: Callable[[Generate], Any] = tasks.run_task,
) -> list[Evaluation]:
    """Evaluate all targets, one backbone after the other; each run keeps what was found of it.

    settings: by dotted keys, as typed. judge: of `judge` tasks. show: called with what the ranks report.
    answer: has the models of `generate` tasks answer.
    Raises QdistError for what cannot be evaluated, before anything is started; KeyboardInterrupt when stopped.
    """
    words = task_words(asked.tasks)
    _refuse_unfit(words, asked, settings, judge)
    refuse_unreadable(words)
    scored = [word for word in words if word.kind not in (*OF_MODELS, *OF_FILES)]
    groups = [group for target in asked.targets for group in groups_of(target, asked, settings)]
    for group in groups:
        _refuse_loss(group, scored)
    here, found = probe.cluster(), list[Evaluation]()
    for group in groups:
        own = _evaluate(group, asked, scored, here, show=show, say=say, backend=backend) if scored else []
        answered = evaluate_models(words, _models_of(group), _answering(asked, settings), answer=answer)
        for evaluation in chain(own, answered):
            found.append(evaluation)
            if group.run is not None:
                _keep(group.run, evaluation)
    return [*found, *evaluate_files(words, judge)]


def _keep(run: RunDir, evaluation: Evaluation) -> None:
    """Add an evaluation to those of a run, and to the card of its adapter."""
    add_evaluation(run.path, evaluation)
    if run.adapter.is_dir():
        write_card(run, run.adapter)


def _refuse_unfit(words: Sequence[TaskWord], asked: Asked, settings: Mapping[str, Any], judge: JudgeSettings) -> None:
    """Raise SpecError for tasks without what they need, and for what none of them uses."""
    of_models = [word for word in words if word.kind not in OF_FILES]
    if of_models and not asked.targets:
        raise SpecError(f"{of_models[0]} is asked of a model, and none is named", try_="qdist evaluate RUN --tasks ...")
    if asked.targets and not of_models:
        raise SpecError(
            f"{' and '.join(map(str, words))} is of files, which {asked.targets[0]} has no part in",
            try_="qdist evaluate --tasks ..., without it",
        )
    if judge.judge_model is None and any(word.kind == "judge" for word in words):
        raise SpecError("judge: asks a model, and none is named", try_="--judge-model NAME")
    if settings and not of_models:
        raise SpecError(f"{next(iter(settings))} is of models, and {words[0]} asks none", try_="the command without it")
    for name, kinds in _unused(words, asked, judge):
        raise SpecError(
            f"--{name.replace('_', '-')} is of {', '.join(kinds)}, and the tasks are {', '.join(map(str, words))}",
            try_="the command without it",
        )
    if not any(word.kind in OF_MODELS for word in words):
        return
    check_gpus(_answering(asked, settings).gpus)
    kept = [key for key in settings if key not in _ANSWERED]
    if kept:
        raise SpecError(
            f"generate: has models answer as they lie, and {kept[0]} is not for that",
            try_=f"generate: in a command of its own, without {kept[0]}",
        )


def _unused(words: Sequence[TaskWord], asked: Asked, judge: JudgeSettings) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Flags that were given and that no task uses, each with the kinds of tasks that would."""
    there = {word.kind for word in words}
    given = {**msgspec.structs.asdict(asked), **msgspec.structs.asdict(judge)}
    usual = {**msgspec.structs.asdict(Asked(tasks="")), **msgspec.structs.asdict(JudgeSettings())}
    for name, kinds in _USED_BY.items():
        if given[name] != usual[name] and not there.intersection(kinds):
            yield name, kinds


def _refuse_loss(group: Group, words: Sequence[TaskWord]) -> None:
    """Raise SpecError for the held-out loss of a model without held-out samples, or whose tokens are gone."""
    if TaskWord("loss") not in words:
        return
    target, data = group.subjects[0].target, group.data
    if data is None or not data.held_out_samples:
        raise SpecError(f"{target} has no held-out samples, which the task loss is of", try_="loss:FILE")
    if not Path(data.path).is_file():
        raise SpecError(f"the tokens of {target} are not in {data.path} any more", try_="loss:FILE")


def _models_of(group: Group) -> list[Model]:
    """Those of a group, as `qdist generate` opens them."""
    reading = reading_of(group.spec.data, group.spec.format)
    return [
        Model(
            own.target, own.what, str(group.run.path) if group.run and own.what != "merged" else group.spec.model,
            own.step, reading,
        )
        for own in group.subjects
    ]  # fmt: skip


def _answering(asked: Asked, settings: Mapping[str, Any]) -> Generate:
    """The request for answers, but for model and prompts."""
    own = {key: value for key, value in settings.items() if key in _ANSWERED}
    request = request_of(Generate, {"run": "", "prompts": "", "out": "", "batch": asked.batch, **own})
    sampling = Sampling(max_new_tokens=asked.max_new_tokens)
    return msgspec.structs.replace(request, limit=asked.limit, sampling=sampling)


def groups_of(target: str, asked: Asked, settings: Mapping[str, Any]) -> Iterator[Group]:
    """What is evaluated of a target. Raises QdistError for one that cannot be."""
    run = RunDir(target)
    if not run.exists():
        if asked.beside:
            raise SpecError(f"--beside is of runs, and {target} is a model", try_="leave it out")
        check_target(target, trusted=bool(settings.get("trust_remote_code")))
        yield Group(_model_spec(target, settings), (Subject(target=target, what="model"),), None, None, None)
        return
    check_target(target)
    merged = run.path / MERGED
    if "merged" in asked.beside and not (merged / "config.json").is_file():
        raise RunError(
            f"{target} has no merged model in {merged}", try_=command("merge", run.path, "--out", str(merged))
        )
    plan = run.plan()
    spec = changed(plan.spec, dict(_of_run(settings, target)))
    step = adapter_step(run)
    own = Subject(target=target, what="adapter", adapter=str(run.adapter.resolve()), step=step[0] if step else None)
    base = (Subject(target=target, what="base"),) if "base" in asked.beside else ()
    yield Group(spec, (*base, own), run, _kept(run, plan), plan.data)
    if "merged" in asked.beside:
        like: dict[str, Any] = {
            "seq_len": spec.seq_len,
            "format": spec.format,
            "train.train_on_source": spec.train.train_on_source,
            "data.columns": spec.data.columns,
            "data.roles": spec.data.roles,
            "data.template": spec.data.template,
        }
        like |= {"train.held_out": spec.train.held_out, "seed": spec.seed}
        alone = _model_spec(str(merged), {**like, **settings})
        yield Group(alone, (Subject(target=target, what="merged"),), run, None, plan.data)


def _of_run(settings: Mapping[str, Any], target: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key not in _OWN:
            raise SpecError(
                f"{key} is of {target} already, which was trained with it", try_=f"without {key}, or a model"
            )
        yield key, value


def _model_spec(name: str, settings: Mapping[str, Any]) -> RunSpec:
    """The spec of a plain model: at 16 bits, or as its folder was quantized."""
    folder = Path(name).expanduser()
    as_it_is = _as_stored(folder) if (folder / "config.json").is_file() else {"bits": 16}
    return resolve(nest({"model": name, **as_it_is, **settings}))


def _as_stored(folder: Path) -> dict[str, Any]:
    """Settings of a folder that is read as it is: GPTQ's, bitsandbytes' or 16 bits."""
    if gptq := stated(folder):
        return {"method": "gptq-lora", "bits": gptq.shape.bits}
    packing = quantized_as(read_json(folder / "config.json"), name=str(folder)) or Packing(bits=16)
    if packing.bits != 4 or packing.type == "mxfp4":
        return {"bits": packing.bits}
    return {"bits": 4, "quant.type": packing.type, "quant.double": packing.double}


def _kept(run: RunDir, plan: Plan) -> Source | None:
    """What the run was prepared from, if it is still there. Raises RunError if another is in its place."""
    source = plan.source
    if not source.tokenizer:
        raise RunError(
            f"{run.path} was trained on random weights and has no tokenizer", try_="a run without --load-format dummy"
        )
    if not Path(source.tokenizer).is_dir() and (run.path / "tokenizer").is_dir():
        source = msgspec.structs.replace(source, tokenizer=str((run.path / "tokenizer").resolve()))
    if not cache.all_there(Prepared(source=source, data=None)):
        return None
    require_same_tensors(source, source.packed, run=str(run.path))
    return source


def _evaluate(
    group: Group,
    asked: Asked,
    words: Sequence[TaskWord],
    here: Cluster,
    *,
    show: Show,
    say: Callable[[str], None],
    backend: Backend,
) -> list[Evaluation]:
    """Have ranks evaluate the models of a group."""
    source = group.source or tasks.prepare_model(group.spec, device=here.device).source
    plan = evaluation_plan(group.spec, source, here, data=group.data, window=asked.window)
    job = EvaluationJob(
        subjects=group.subjects,
        tasks=tuple(map(str, words)),
        limit=asked.limit,
        window=asked.window,
        stride=asked.stride,
        chat=asked.chat,
        longest=plan.seq_len,
    )
    parent = group.run.path / "evaluations" if group.run else Path(tempfile.mkdtemp(prefix="qdist-evaluation-"))
    stem = "-".join(dict.fromkeys(word.kind for word in words))
    launch = Launch(RunDir(free_name(parent, stem)), plan, _files(plan, job), (), stem)
    with _tidied(group, parent):
        return _found(launch, show=show, say=say, backend=backend)


def _found(launch: Launch, *, show: Show, say: Callable[[str], None], backend: Backend) -> list[Evaluation]:
    """What the ranks of an evaluation found, once they have ended."""
    with claimed(launch) as own:
        found = own.job.run.path / FOUND
        try:
            attend(own, backend, show=show, say=say, done=found.is_file, loses="stopped; nothing was kept")
        except KeyboardInterrupt:
            shutil.rmtree(own.job.run.path, ignore_errors=True)
            raise
        except JobError as error:
            raise JobError(error.message, try_=_again(error.try_)) from error
        return read_typed(found, list[Evaluation], RunError)


@contextmanager
def _tidied(group: Group, parent: Path) -> Iterator[None]:
    """Remove what was made for a model without a run, or is empty; after a failure the logs in it are needed."""
    try:
        yield
    except KeyboardInterrupt:
        _remove_made(group, parent)
        raise
    _remove_made(group, parent)


def _remove_made(group: Group, parent: Path) -> None:
    if group.run is None:
        shutil.rmtree(parent, ignore_errors=True)
    else:
        with suppress(OSError):  # other evaluations of the run are kept there
            parent.rmdir()


def _again(way: str) -> str:
    """What to try, but for what resumes a run: evaluations are done again."""
    return "the same command again" if "--resume" in way else way


def _files(plan: Plan, task: EvaluationJob) -> dict[str, str]:
    def text(value: object) -> str:
        return msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n"

    script = launch_script(plan, python=sys.executable, evaluates=True)
    return {JOB: text(task), "launch.sh": script, PLAN: text(plan)}
