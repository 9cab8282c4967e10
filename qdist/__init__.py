"""qdist: fine-tune quantized language models on whatever GPUs are there, with one command.

`plan` and `launch` are what the commands of these names do, from Python; `load` opens what came of them. Settings are
keywords: keys of `qdist.core.spec.run_spec.RunSpec` (`seq_len`, `**{"lora.r": 8}`), the last part of one where only one
ends so (`dropout`), or the name of a flag (`lora_r`). What the user can put right is a `qdist.core.errors.QdistError`:
one sentence, and one thing to try.
"""

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path  # a third of the time that `qdist --help` takes

    from qdist.core.planning.plan import Plan


class Finished(NamedTuple):
    """A run that has come to its end."""

    path: "Path"
    """Its directory, which `load` takes."""
    plan: "Plan"
    result: dict[str, Any]
    """What it wrote last: steps, held-out losses, speed, peaks of memory."""


def plan(
    recipe: str | PathLike[str] | None = None,
    *,
    gpu_memory: str | None = None,
    gpu_name: str | None = None,
    host_memory: str | None = None,
    nodes: int | str | None = None,
    network: str | None = None,
    **settings: Any,
) -> "Plan":
    """How a run would lie in memory and how fast it would go: `qdist.plan(model="smollm2-135m", gpus=2)`.

    recipe: a TOML file, or the name of one that is shipped; settings win over it.
    gpu_memory, gpu_name, host_memory: of another machine than this one, such as '48GiB' and 'RTX 4090'.
    nodes: of that machine, a number or a TOML file of them; network: between them, such as '25Gbit,0.1ms'.

    Raises SpecError for what is not a setting, with the nearest, or contradicts another; PlanError for what does not
    fit.
    """
    from qdist.core.spec.lookup import named_settings
    from qdist.host.launch.planning import PlanRequest, planned

    return planned(
        PlanRequest(
            recipe=None if recipe is None else str(recipe),
            settings=named_settings(settings),
            gpu_memory=gpu_memory,
            gpu_name=gpu_name,
            host_memory=host_memory,
            nodes=nodes,
            network=network,
        )
    )


def launch(recipe: str | PathLike[str] | None = None, *, resume: bool = False, **settings: Any) -> Finished:
    """Plan a run, start its ranks, and stay until it has ended: `qdist.launch(model="smollm2-135m", data="my.jsonl")`.

    recipe: as `plan` has it. resume: go on with the run in `run`, and with settings that are changed for its rest.
    Lines for the user go to standard error; the run's directory has everything else.

    Raises what `plan` raises; ModelError and DataError for what cannot be read; RunError for a directory that cannot be
    used; JobError when a rank died, with what it said last; KeyboardInterrupt when the run was stopped and saved.
    """
    from functools import partial

    from qdist.core.spec.lookup import named_settings
    from qdist.core.spec.run_spec import nest
    from qdist.host import terminal
    from qdist.host.launch import prepare, ranks
    from qdist.host.launch.claim import claimed
    from qdist.host.launch.planning import job_of
    from qdist.host.run.rundir import RunDir

    say = partial(terminal.say, err=True)
    given = nest(named_settings(settings))
    job = job_of(None if recipe is None else str(recipe), given, resume=resume, say=say)
    run = job if isinstance(job, RunDir) else job.run
    if isinstance(job, prepare.Launch):
        with claimed(job) as own:
            run = own.job.run
            ranks.start(own, show=lambda events: None, say=say)
    decided = run.plan()
    return Finished(run.path, decided, run.result_of(decided, whole=True) or {})


def load(
    run_or_model: str | PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_memory: str | int | None = None,
) -> tuple[Any, Any]:
    """A run with its adapter on, or any model, as `(model, tokenizer)`; see `qdist.runtime.infer.load.load`."""
    from qdist.runtime.infer.load import load as heavy_load

    return heavy_load(fspath(run_or_model), dtype=dtype, device=device, max_memory=max_memory)


__all__ = ["Finished", "launch", "load", "plan"]
