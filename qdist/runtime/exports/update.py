"""The update of each linear by trained adapters, read from their folders one linear at a time."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from math import gcd
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.requests import Folding
from qdist.core.text import command
from qdist.host.opening import converted, read_object
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.adapters.lora import LoraSettings, Term, adapted_path, tensor_name
from qdist.runtime.adapters.registry import method_of
from qdist.runtime.formats.packed_folder import Entry, opened, stored_entries
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG, require_adapter
from qdist.runtime.infer.load import load_tokenizer, plan_of

_ROWS = "base_model.model.%s.token_adapter.trainable_tokens_delta"
"""PEFT's name of the trained rows of the table at a module path."""


class Update(NamedTuple):
    """The sum of the adapters' updates to one linear."""

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
        """Paths of the modules that any of them changes."""
        return frozenset(path for names in self._names for name in names if (path := adapted_path(name)) is not None)

    def of(self, path: str) -> Update | None:
        """The update of the linear at a module path; None if there is none."""
        terms = [term for index in range(len(self.runs)) if (term := self._term(index, path)) is not None]
        for term in terms:
            # What bounds B A by element, so that nothing as large has to be made.
            require_finite(term.factor * term.up.abs().sum(0) * term.down.abs().amax(1), path)
        return Update(tuple(terms)) if terms else None

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
