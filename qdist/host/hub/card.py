"""Writes the model card of an adapter or a merged model, unless a person has made it theirs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qdist.core.errors import QdistError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.card import README, Card, card_text, is_ours, license_of
from qdist.core.telemetry.history import RunHistory
from qdist.host.data.sources import hub_ids
from qdist.host.files import write_atomic
from qdist.host.opening import read_bytes, read_typed
from qdist.host.run.evaluations import read_evaluations
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir, noted
from qdist.host.sources.models import is_hub_id, locate, public_name
from qdist.host.sources.targets import adapter_step
from qdist.host.terminal import say

_VERSIONS = "versions.json"
_MOST_BYTES = 1 << 20


def write_card(run: RunDir, folder: Path, *, step: int | None = None, before: Path | None = None) -> None:
    """Write a run's card into its adapter's folder. One that a person has changed stays.

    step: of the checkpoint. before: the folder that this one takes the place of, whose changed card comes along.
    """
    kept = theirs_in(before or folder)
    if kept:
        write_atomic(folder / README, kept)
    else:
        _write(folder, lambda: card_text(card_of(run, step=step)))


def write_merged_card(folder: Path, runs: Sequence[RunDir], how: str) -> None:
    """Write the card of a merged model, of the first of its runs. how: it was merged, as a sentence."""
    if not theirs_in(folder):
        others = "".join(f" {run.path.resolve().name} is merged too." for run in runs[1:])
        _write(folder, lambda: card_text(card_of(runs[0])._replace(of="merged", merged=how + others)))


def _write(folder: Path, text: Callable[[], str]) -> None:
    """A card is no reason for an adapter not to be written."""
    try:
        made = text()
    except QdistError as error:
        say(f"note     no model card: {error.message}", err=True)
    else:
        write_atomic(folder / README, made)


def theirs_in(folder: Path) -> str:
    """The card in a folder if a person wrote or changed it; else empty."""
    path = folder / README
    if not path.is_file():
        return ""
    text = read_bytes(path, RunError).decode(errors="replace")
    return "" if is_ours(text) else text


def card_of(run: RunDir, *, step: int | None = None) -> Card:
    """What a run's card is made of. Raises RunError where its files cannot be read."""
    plan = run.plan()
    fold = RunHistory(total_steps=plan.steps)
    Follower(run.path).fold_into(fold)
    stated = adapter_step(run)
    versions = run.path / _VERSIONS
    return Card(
        name=run.path.resolve().name,
        plan=plan,
        fold=fold,
        step=step if step is not None else stated[0] if stated else None,
        result=run.result_of(plan),
        base=base_id(plan),
        license=_license(plan),
        data_sets=hub_ids(plan.spec.data.path),
        commands=noted(run),
        versions=read_typed(versions, dict[str, str], RunError) if versions.is_file() else {},
        evaluations=read_evaluations(run.path),
    )


def base_id(plan: Plan) -> str:
    """Hub id of a run's base; empty for a folder, a file, random weights and an alias without one."""
    model = plan.spec.model
    if plan.source.kind == "dummy":
        return ""
    public = public_name(model, plan.source.path)
    if is_hub_id(public) and not Path(public).exists():
        return public
    if Path(model).expanduser().exists():
        return ""
    try:
        found = locate(model)
    except QdistError:
        return ""
    return found.path if found.kind == "hub" else ""


def _license(plan: Plan) -> str:
    path = Path(plan.source.path, README)
    if not plan.source.path or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return ""
    return license_of(path.read_text(errors="replace"))
