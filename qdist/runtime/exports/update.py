"""The update of each linear and expert by trained adapters, read from their folders one parameter at a time."""

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from math import gcd
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.requests import Folding
from qdist.core.text import command, counted
from qdist.host.opening import converted, read_object
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.adapters.lora import LoraSettings, Term, adapted_path, parameter_path, tensor_name
from qdist.runtime.adapters.registry import method_of
from qdist.runtime.formats.packed_folder import Entry, opened, stored_entries
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG, require_adapter
from qdist.runtime.infer.load import load_tokenizer, plan_of

_ROWS = "base_model.model.%s.token_adapter.trainable_tokens_delta"
"""PEFT's name of the trained rows of the table at a module path."""


class Update(NamedTuple):
    """The sum of the adapters' updates to one linear, or to one expert's matrix."""

    terms: tuple[Term, ...]

    def dense(self) -> torch.Tensor:
        """The full update, float32 [out, in]."""
        parts = [t.factor * (t.up @ t.down).repeat_interleave(t.pool, dim=1) for t in self.terms]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def pooled(self, pool: int) -> torch.Tensor:
        """The update of each weight in a group of `pool` inputs, float32 [groups, out].

        Raises ValueError if it is not one number.
        """
        if any(term.pool % pool for term in self.terms):
            raise ValueError(f"groups of {pool} do not divide those of {[term.pool for term in self.terms]}")
        parts = [t.factor * (t.up @ t.down).t().repeat_interleave(t.pool // pool, dim=0) for t in self.terms]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class Folded(NamedTuple):
    """How much of the adapters went into a model that was written."""

    linears: int
    all_linears: int
    experts: int
    """Parameters of experts, each a layer's."""
    all_experts: int

    def __str__(self) -> str:
        words = f"folded {self.linears:,} of {counted(self.all_linears, 'linear')}"
        experts = counted(self.all_experts, "expert parameter")
        return words + (f", {self.experts:,} of {experts}" if self.all_experts else "")


class Adapters:
    """The adapters of runs over one base, each with a weight on its update."""

    @classmethod
    def named_in(cls, request: Folding) -> "Adapters":
        """The adapters in a request. Raises RunError as the constructor does."""
        return cls([RunDir(run) for run in request.runs], request.weights)

    def __init__(self, runs: Sequence[RunDir], weights: Sequence[float] = ()) -> None:
        """weights: one per run; may be omitted for a single run.

        Raises RunError for runs that have no adapter, or are not of one base.
        """
        self.runs = tuple(runs)
        self.weights = tuple(weights) or (1.0,) * len(runs)
        if len(self.weights) != len(self.runs):
            raise RunError(f"{len(self.runs)} runs and {len(self.weights)} weights", try_="a weight for each run")
        for run in self.runs:
            if not (run.adapter / ADAPTER).is_file():
                raise RunError(f"{run.path} has no adapter yet", try_=command("gather", run.path))
            require_adapter(run.adapter)
        _require_one_base(self.runs)
        if len(self.runs) > 1 and any(_learnt_rows(run) for run in self.runs):
            raise RunError("adapters that hold rows of new tokens cannot be added up", try_="runs without new tokens")

    @cached_property
    def plan(self) -> Plan:
        """Plan of the first run; the runs share everything in it that concerns the base."""
        return plan_of(self.runs[0])

    @property
    def alone(self) -> bool:
        """Whether this is a single run, unscaled, to which the run's own losses apply."""
        return self.weights == (1.0,)

    @cached_property
    def configs(self) -> tuple[dict[str, Any], ...]:
        """PEFT's configuration of each run. Raises RunError if one cannot be read."""
        return tuple(
            read_object(run.adapter / ADAPTER_CONFIG, RunError, try_=command("gather", run.path)) for run in self.runs
        )

    @cached_property
    def _settings(self) -> tuple[LoraSettings, ...]:
        return tuple(self._settings_of(run, config) for run, config in zip(self.runs, self.configs, strict=True))

    @staticmethod
    def _settings_of(run: RunDir, config: dict[str, Any]) -> LoraSettings:
        path, kind = run.adapter / ADAPTER_CONFIG, method_of(config).settings_type
        return converted(config, kind, str(path), RunError, try_=command("gather", run.path))

    @property
    def pool(self) -> int:
        """The largest group within which every update is constant; 1 if one of them is plain LoRA."""
        return gcd(*(config.pool for config in self._settings))

    def entries(self, index: int) -> list[Entry]:
        """The tensors of one run's adapter."""
        return stored_entries(self.runs[index].adapter, ADAPTER)

    @property
    def stamp(self) -> str:
        """SHA-256 of the adapters, their settings and weights."""
        sums = hashlib.sha256(repr(self.weights).encode())
        for run in self.runs:
            for name in (ADAPTER, ADAPTER_CONFIG):
                with open(run.adapter / name, "rb") as file:
                    sums.update(hashlib.file_digest(file, "sha256").digest())
        return sums.hexdigest()

    @cached_property
    def paths(self) -> frozenset[str]:
        """Paths of the linears that any of them changes."""
        within = {path for own in self._experts for path in own.values()}
        found = (adapted_path(name) for names in self._names for name in names)
        return frozenset(path for path in found if path is not None and path not in within)

    @cached_property
    def experts(self) -> frozenset[str]:
        """Names of the experts' parameters that any of them changes."""
        return frozenset(name for own in self._experts for name in own)

    def of(self, path: str) -> Update | None:
        """The update of the linear at a module path; None if there is none."""
        terms = [term for index in range(len(self.runs)) if (term := self._term(index, path)) is not None]
        return _checked(Update(tuple(terms)), path) if terms else None

    def of_experts(self, name: str) -> tuple[Update, ...] | None:
        """The update of each expert's matrix [out, in] in a parameter; None if there is none."""
        terms = [self._terms_of_experts(index, name) for index, own in enumerate(self._experts) if name in own]
        return tuple(_checked(Update(each), name) for each in zip(*terms, strict=True)) if terms else None

    def require_folded(self, weights: Collection[str], tables: Collection[str]) -> Folded:
        """What the adapters change, counted.

        weights: names of the weights that are written. tables: module paths of embedding and head.

        Raises ModelError for a tensor of an adapter that changes none of them: it would be lost without a word.
        """
        linears = {path for path in self.paths if f"{path}.weight" in weights}
        experts = {name for name in self.experts if name in weights}
        for run, names, own in zip(self.runs, self._names, self._experts, strict=True):
            paths = {*linears, *(path for name, path in own.items() if name in experts)}
            used = {tensor_name(path, side) for path in paths for side in "AB"}
            used |= {_ROWS % path for path in tables}
            if lost := sorted(names - used):
                raise ModelError(
                    f"{run.adapter}: {len(lost)} of {len(names)} tensors change no weight, such as {lost[0]}",
                    try_="qdist doctor: transformers or peft may be of another version than the run's",
                )
        return Folded(len(linears), len(self.paths), len(experts), len(self.experts))

    def rows(self, path: str) -> torch.Tensor | None:
        """The trained rows of new tokens [new, hidden] of the table at a module path; None if it has none.

        Of several runs the first one's: they have none but that of a pad token, which is masked everywhere.
        """
        name = _ROWS % path
        return self._read(0, name).float() if name in self._names[0] else None

    def _term(self, index: int, path: str) -> Term | None:
        if tensor_name(path, "A") not in self._names[index]:
            return None
        own, down, up = self._settings[index], *(self._read(index, tensor_name(path, side)) for side in "AB")
        return Term(down.float(), up.float(), self.weights[index] * own.factor(path, down), own.pool)

    def _terms_of_experts(self, index: int, name: str) -> list[Term]:
        """PEFT keeps A of all experts as [E r, in], and B as [out, r E] with the experts of a column side by side."""
        own, path = self._settings[index], self._experts[index][name]
        down, up = (self._read(index, tensor_name(path, side)).float() for side in "AB")
        count = self._counts[name]
        downs = down.reshape(count, -1, down.shape[1])
        ups = up.reshape(up.shape[0], -1, count).permute(2, 0, 1)
        factor = self.weights[index] * own.factor(name, downs[0])
        return [Term(downs[expert], ups[expert].contiguous(), factor, 1) for expert in range(count)]

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Experts of each parameter of experts."""
        return {f"{path}.{each.name}": experts.count for path, experts in self.plan.facts.experts.items()
                for each in experts.matrices}  # fmt: skip

    @cached_property
    def _experts(self) -> tuple[dict[str, str], ...]:
        """For each run, PEFT's module path of the adapter of each parameter of experts."""
        return tuple(self._experts_of(own) for own in self._settings)

    def _experts_of(self, own: LoraSettings) -> dict[str, str]:
        found: dict[str, str] = {}
        for path, experts in self.plan.facts.experts.items():
            names = [each.name for each in experts.matrices if _is_targeted(f"{path}.{each.name}", own)]
            found |= {f"{path}.{name}": parameter_path(path, names, name) for name in names}
        return found

    @cached_property
    def _names(self) -> tuple[frozenset[str], ...]:
        found = []
        for run in self.runs:
            with opened(run.adapter / ADAPTER) as handle:
                found.append(frozenset(handle.keys()))
        return tuple(found)

    def _read(self, index: int, name: str) -> torch.Tensor:
        with opened(self.runs[index].adapter / ADAPTER) as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


def _is_targeted(name: str, settings: LoraSettings) -> bool:
    """Whether PEFT adapts a parameter, by its own rule."""
    return any(f".{name}".endswith(f".{target}") for target in settings.target_parameters or ())


def _checked(update: Update, name: str) -> Update:
    for term in update.terms:
        # What bounds B A by element, so that nothing as large has to be made.
        require_finite(term.factor * term.up.abs().sum(0) * term.down.abs().amax(1), name)
    return update


def _learnt_rows(run: RunDir) -> bool:
    """Whether a run trained rows that texts use. A pad token's row is always masked."""
    plan = plan_of(run)
    tokenizer = load_tokenizer(plan.source)
    return bool(set(plan.source.new_token_ids) - {tokenizer.pad_token_id if tokenizer else None})


def require_finite(values: torch.Tensor, path: str) -> None:
    """Refuse an update with NaN or infinite values."""
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"the update of {path} is infinite or no number", try_="another checkpoint, or smaller weights"
        )


def _require_one_base(runs: Sequence[RunDir]) -> None:
    plans = [run.plan() for run in runs]
    bases = [(plan.source.path, plan.source.packed, plan.spec.bits, plan.source.gptq) for plan in plans]
    rows = [plan.source.new_token_ids for plan in plans]
    if len(set(rows)) > 1:
        raise RunError(f"the runs added different rows to the vocabulary: {rows}", try_="runs that added the same")
    tensors = [(plan.source.digest, plan.spec.bits, plan.source.gptq) for plan in plans]
    if all(own == tensors[0] for own in tensors) and plans[0].source.digest:  # the same, wherever each run has them
        return
    for run, base in zip(runs, bases, strict=True):
        if base != bases[0]:
            raise RunError(
                f"{runs[0].path} was trained on {bases[0][0]}, and {run.path} on {base[0]}", try_="runs over one base"
            )
    known = {plan.source.fingerprint: run for run, plan in zip(runs, plans, strict=True) if plan.source.fingerprint}
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise RunError(
            f"{bases[0][0]} held other tensors when {one.path} was trained than when {other.path} was",
            try_="runs over one base",
        )
