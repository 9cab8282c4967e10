"""Which trained adapter a new run starts from, and whether it fits the run; small reads only, no torch."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.errors import RunError
from qdist.core.model.adapters.qa_lora import alphas
from qdist.core.model.shapes import EXPERTS, LayerShape
from qdist.core.planning.plan import Plan, Start
from qdist.core.spec.keys import choices
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import command, resuming
from qdist.host.opening import converted, read_typed
from qdist.host.run.rundir import RunDir
from qdist.host.sources.models import ADAPTER_FOLDER
from qdist.host.sources.targets import ADAPTER, read_header, require_adapter

_MATRIX = re.compile(r".*?\.(\d+)\.(?:.+\.)?(\w+)\.lora_([AB])\.weight")
_INNER = "base_layer"
"""PEFT's name for what an adapter lies around."""
Shapes = dict[tuple[int, str, str], tuple[int, ...]]
"""Shapes by (layer, leaf name of the linear, A or B)."""


class _Tensor(msgspec.Struct):
    """What is read about a tensor from a file's header."""

    shape: tuple[int, ...]


class _Config(msgspec.Struct):
    """What is read from PEFT's adapter_config.json."""

    peft_type: str
    r: int
    lora_alpha: float
    use_qalora: bool = False
    qalora_group_size: int = 16
    alpha_pattern: dict[str, float] = {}
    rank_pattern: dict[str, int] = {}
    target_parameters: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, tuple[int, ...]] | tuple[int, ...] | None = None
    bias: str = "none"

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Vocabulary rows that the adapter has trained."""
        rows = self.trainable_token_indices or ()
        return next(iter(rows.values()), ()) if isinstance(rows, dict) else rows

    @property
    def foreign(self) -> str:
        """Features that no qdist adapter has; empty for none."""
        has = {
            f"peft_type={self.peft_type}": self.peft_type != "LORA", "rank_pattern": bool(self.rank_pattern),
            "use_dora": self.use_dora, "modules_to_save": bool(self.modules_to_save),
            f"bias={self.bias}": self.bias != "none",
        }  # fmt: skip
        return ", ".join(name for name, there in has.items() if there)


def adapter_rank(folder: Path) -> int:
    """The rank that an adapter's configuration states."""
    return read_typed(folder / ADAPTER_FOLDER, _Config, RunError, try_="an adapter that PEFT wrote").r


def find_adapter(name: str) -> Path:
    """The folder of an adapter: a run's, or one that PEFT wrote. Raises RunError if there is none."""
    run, folder = RunDir(name), Path(name).expanduser()
    if run.exists():
        require_adapter(run)
        folder = run.adapter
    if (folder / ADAPTER_FOLDER).is_file() and (folder / ADAPTER).is_file():
        return folder.resolve()
    if (folder / ADAPTER_FOLDER).is_file():
        raise RunError(f"{folder} has no {ADAPTER}", try_="PEFT's save_pretrained, which writes it")
    if name in choices(RunSpec, "method"):
        raise RunError(f"{name} is a method, not an adapter to start from", ways=[{"adapter": None, "method": name}])
    raise RunError(f"{name} is neither a run nor a folder with {ADAPTER_FOLDER}", try_="such a folder, or a run")


def start_of(plan: Plan) -> Start | None:
    """Location and digest of the adapter that a new run starts from; None if it starts with a fresh one.

    Raises RunError as `require_fit` does.
    """
    if plan.spec.adapter is None:
        return None
    require_fit(plan)
    folder = find_adapter(plan.spec.adapter)
    return Start(path=str(folder), digest=digest_of(folder))


def digest_of(folder: Path) -> str:
    """SHA-256 of the file with an adapter's tensors."""
    with open(folder / ADAPTER, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_start(start: Start, run: RunDir) -> None:
    """Raise RunError if a run without checkpoints would start from a different adapter than planned."""
    folder = Path(start.path)
    if not (folder / ADAPTER).is_file():
        raise RunError(
            f"{folder} has no {ADAPTER}, and {run.path} starts from it: there is no checkpoint yet",
            try_="put that adapter back, or a new run",
        )
    if (found := digest_of(folder)) != start.digest:
        raise RunError(
            f"{folder} is not the adapter that {run.path} was to start from: its digest is {found[:12]}, and was "
            f"{start.digest[:12]}",
            try_=f"put that adapter back, then {resuming(run.path)}; or start a new run from this one",
        )


def require_fit(plan: Plan) -> None:
    """Raise RunError, with numbers, if the adapter to start from does not match the one that the run trains."""
    spec, name = plan.spec, plan.spec.adapter
    if name is None:
        return
    folder = find_adapter(name)
    config = read_typed(folder / ADAPTER_FOLDER, _Config, RunError, try_="an adapter that PEFT wrote")
    if foreign := config.foreign:
        raise RunError(f"{folder} has {foreign}, which no run trains", try_="merge it with PEFT, and --model DIR")
    if RunDir(folder.parent).exists():
        _require_same_base(RunDir(folder.parent).plan(), plan, name)
    found = _shapes(folder / ADAPTER)
    if change := dict(_differences(config, found, plan)):
        now = {key: _now(spec, key) for key in change}
        raise RunError(f"the adapter in {folder} has {_listed(change)}, and this run {_listed(now)}", ways=[change])
    _require_shapes(found, plan, name)
    rows = plan.source.new_token_ids
    if config.new_tokens not in ((), rows) and plan.source.path:
        raise RunError(
            f"the adapter in {folder} has the rows of tokens {_numbers(config.new_tokens)}, and this run "
            f"{_numbers(rows)}",
            try_="--set new_tokens=NAMES, those of the run that trained it",
        )


def _shapes(path: Path) -> Shapes:
    """The shapes of a file's matrices."""
    named = ((_MATRIX.fullmatch(key), value) for key, value in read_header(path).items())
    return {
        (int(at[1]), at[2], at[3]): converted(value, _Tensor, str(path), RunError).shape for at, value in named if at
    }


def _require_same_base(old: Plan, plan: Plan, name: str) -> None:
    """Refuse an adapter trained on another model or by another method."""
    if old.spec.method != plan.spec.method:
        raise RunError(
            f"{name} was trained by {old.spec.method}, and this run is {plan.spec.method}",
            ways=[{"method": old.spec.method}],
        )
    if old.spec.load_format != plan.spec.load_format:
        raise RunError(
            f"{name} was trained on {'random' if old.spec.load_format == 'dummy' else 'real'} weights, and this run "
            "is not",
            ways=[{"load_format": old.spec.load_format}],
        )
    was, now = old.source.original, plan.source.original
    if was and now and was != now:
        raise RunError(
            f"{name} was trained on {old.spec.model}, and this run is over {plan.spec.model}: the fingerprint of its "
            f"tensors is {now[:12]}, and was {was[:12]}",
            ways=[{"model": old.spec.model}] if old.spec.model != plan.spec.model else [],
            try_=""
            if old.spec.model != plan.spec.model
            else f"{command('merge', name, '--out', 'DIR')}, while it is whole",
        )


def _differences(config: _Config, found: Shapes, plan: Plan) -> Iterator[tuple[str, Any]]:
    """The settings that differ, with the values that would make the run train such an adapter."""
    spec = plan.spec
    if config.use_qalora != (spec.method == "qa-lora"):
        yield "method", "qa-lora" if config.use_qalora else "gptq-lora"
        return
    if config.r != spec.lora.r:
        yield "lora.r", config.r
    if config.lora_alpha != spec.lora.alpha:
        yield "lora.alpha", config.lora_alpha
    if config.use_rslora != (spec.lora.variant == "rslora"):
        yield "lora.variant", "rslora" if config.use_rslora else "lora"
    targeted = {linear.name for shape in plan.facts.shapes for linear in shape.targeted(spec.lora.targets)}
    names = {name for _, name, _ in found} - _nested(plan)
    experts = _expert_targets(config.target_parameters or (), plan)
    others = experts != _expert_targets(plan.facts.targeted_parameters(spec.lora.targets), plan)
    if (names != targeted or others) and names <= set(plan.facts.linear_names):
        yield "lora.targets", (*(name for name in plan.facts.linear_names if name in names), *experts)
    elif config.use_qalora:
        yield from _other_pooling(config, plan)


def _expert_targets(parameters: Collection[str], plan: Plan) -> tuple[str, ...]:
    """Targets that stand for parameters of experts, of which `target_parameters` may have others too."""
    there = plan.facts.targeted_parameters((EXPERTS,))
    found = [name for name in there if name in parameters]
    if found and len(found) == len(there):
        return (EXPERTS,)
    return tuple(dict.fromkeys(f"{EXPERTS}.{name.rpartition('.')[2]}" for name in found))


def _nested(plan: Plan) -> set[str]:
    """Leaf names under which PEFT stores adapters of experts: around their module, and within that one."""
    paths = (shape.experts.path for shape in plan.facts.shapes if shape.experts)
    return {_INNER, *(path.rpartition(".")[2] for path in paths)}


def _other_pooling(config: _Config, plan: Plan) -> Iterator[tuple[str, Any]]:
    if config.qalora_group_size != plan.pool:
        yield "lora.pool_group_size", config.qalora_group_size
        return
    targeted, lora = plan.facts.targeted(plan.spec.lora.targets), plan.spec.lora
    for pool in choices(RunSpec, "lora.pool"):
        other = msgspec.convert({**msgspec.to_builtins(lora), "pool": pool}, type(lora))
        spec = msgspec.structs.replace(plan.spec, lora=other)
        pattern = {} if pool == "peft" else alphas(spec, targeted, plan.pool)
        if pattern == config.alpha_pattern and pool != lora.pool:
            yield "lora.pool", pool
        if pattern == config.alpha_pattern:
            return


def _require_shapes(found: Shapes, plan: Plan, name: str) -> None:
    """Refuse an adapter for another model shape, naming the first linear that differs."""
    wanted: Shapes = {}
    for layer, run in enumerate(plan.facts.run_of_layer):
        for linear in plan.facts.shapes[run].targeted(plan.spec.lora.targets):
            wanted[layer, linear.name, "A"] = (plan.spec.lora.r, linear.inputs // plan.pool)
            wanted[layer, linear.name, "B"] = (linear.outputs, plan.spec.lora.r)
        wanted |= _expert_shapes(layer, plan.facts.shapes[run], plan)
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            layer, leaf, matrix = key
            raise RunError(
                f"{name} is over another model than {plan.spec.model}: {matrix} of {leaf} in layer {layer} is "
                f"{_size(found.get(key))}, and would be {_size(wanted.get(key))}",
                try_="the model that it was trained on",
            )


def _expert_shapes(layer: int, shape: LayerShape, plan: Plan) -> Shapes:
    """The shapes of adapters of a layer's experts. PEFT nests them: the last parameter's lies around the others'."""
    wanted: Shapes = {}
    matrices = shape.targeted_matrices(plan.spec.lora.targets)
    for matrix in matrices:
        assert shape.experts  # whose matrices these are
        leaf = shape.experts.path.rpartition(".")[2] if matrix is matrices[-1] else _INNER
        rows = plan.spec.lora.r * shape.experts.count
        wanted[layer, leaf, "A"], wanted[layer, leaf, "B"] = (rows, matrix.inputs), (matrix.outputs, rows)
    return wanted


def _size(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "not there"


def _numbers(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows)) or "none"


def _listed(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in change.items())


def _now(spec: RunSpec, key: str) -> Any:
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value
