"""Adapters of several runs over one base, in one model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qdist.core.errors import RunError
from qdist.core.planning.plan import Plan
from qdist.core.text import command
from qdist.host.opening import told
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.adapters.attach import FusedLora, settle_offloaded
from qdist.runtime.formats.recorded_sums import require_adapter
from qdist.runtime.infer.load import read_adapter_config


def require_one_base(runs: Sequence[RunDir], plans: Sequence[Plan]) -> None:
    """Raise RunError for a run whose adapter was trained on other weights than the first one's."""
    first = _base(plans[0])
    for run, plan in zip(runs[1:], plans[1:], strict=True):
        for what, own in _base(plan).items():
            if own != first[what]:
                raise RunError(
                    f"{run.path} and {runs[0].path} have different bases: {what} {own} and {first[what]}",
                    try_="runs over one base",
                )


def _base(plan: Plan) -> dict[str, object]:
    """What two runs over one base have in common, by what it is called."""
    source = plan.source
    return {
        "model": plan.spec.model if not source.digest else source.config.get("model_type"),
        "precision": f"{plan.spec.bits} bits",
        "compute dtype": plan.compute_dtype,
        "weights with digest": source.digest or source.packed,
        "vocabulary rows": source.vocab_rows,
    }


def add_run(model: Any, run: RunDir, name: str) -> None:
    """Add the adapter of another run over the same base to a model of `load_run`, under a name of PEFT's.

    Raises RunError for an adapter of another model, and where one has more than linears: PEFT holds one of those.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    require_adapter(run.adapter)
    config = read_adapter_config(run)
    for own in (config, *model.peft_config.values()):
        if own.target_parameters or own.trainable_token_indices:
            what = "experts" if own.target_parameters else "rows of the vocabulary"
            raise RunError(f"an adapter of {what} answers alone; {run.path} was to answer beside it", try_="one run")
    config._register_custom_module({nn.Linear: FusedLora})
    with told(f"{run.adapter} cannot be read", RunError, try_=command("gather", run.path)):
        tensors = load_file(run.adapter / ADAPTER)
        model.add_adapter(name, config)
        unknown = set_peft_model_state_dict(model, tensors, adapter_name=name).unexpected_keys
    if unknown:
        raise RunError(f"{run.path} has an adapter of another model: {unknown[0]}", try_="runs over one base")
    settle_offloaded(model)
    model.eval()


def switch_of(model: Any, known: Mapping[str, str]) -> Callable[[str], None]:
    """What has one adapter of a PEFT model compute all that comes, or the base alone for an empty name.

    known: PEFT's names by the adapters' names.
    """

    def select(name: str) -> None:
        if not name:
            model.base_model.disable_adapter_layers()
            return
        model.base_model.enable_adapter_layers()
        model.set_adapter(known[name])
        model.requires_grad_(False)

    return select
