"""What does QA-LoRA count and refuse? Xu et al. 2023: the update must be constant in every GPTQ group."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from qdist.core.errors import Change, SpecError
from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import Pool

_UNPOOLED: Change = {"method": "gptq-lora", "lora.pool": "peft", "lora.pool_group_size": None}
_OTHER_GROUPS: tuple[Change, ...] = tuple({"quant.group_size": size} for size in (128, 64, 32))
"""Changes of the group size to suggest for random weights; a checkpoint keeps its own."""


class QaLoraMethod(LoraMethod, frozen=True):
    """LoRA whose A reads groups of inputs, on a GPTQ checkpoint into which it merges without loss."""

    merges_exactly: ClassVar[bool] = True
    gradient_reads: ClassVar[int] = 0
    """0, because the pooled inputs are kept."""

    @property
    def title(self) -> str:
        return f"QA-LoRA, inputs pooled by {self.pool},"

    @classmethod
    def of_run(cls, spec: RunSpec, gptq: Gptq | None, facts: ModelFacts) -> Self:
        """Raises SpecError where the adapter could not fold into the checkpoint: groups of scattered inputs, no groups,
        a pool that cuts through them or does not divide a linear's inputs.
        """
        assert gptq is not None  # `gptq.of_run` has seen to it
        if gptq.desc_act:
            raise SpecError(
                f"{spec.model} was quantized in activation order: its groups are of scattered inputs, which qa-lora "
                "cannot pool",
                try_="--method gptq-lora, or qdist quantize it without --desc-act",
                ways=[_UNPOOLED],
            )
        sizes = gptq.group_sizes
        if -1 in sizes:
            raise SpecError(
                f"{spec.model} has linears without groups, and qa-lora needs groups to pool",
                try_="--method gptq-lora, or qdist quantize it with --group-size 32",
                ways=[*_OTHER_GROUPS, _UNPOOLED],
            )
        pool = spec.lora.pool_group_size or max(sizes)
        cut = [size for size in sorted(sizes) if pool % size]
        if cut:
            raise SpecError(
                f"lora.pool_group_size={pool} is not a multiple of {spec.model}'s groups of {cut[0]}",
                ways=[{"lora.pool_group_size": -(-pool // cut[0]) * cut[0]}, {"lora.pool_group_size": None}],
            )
        _require_whole_groups(spec, facts.targeted(spec.lora.targets), pool)
        return cls(pool)

    def saved_inputs(
        self,
        shape: LayerShape,
        adapted: tuple[Linear, ...],
        compute_bytes: int,
        *,
        casts: bool,
        dropout: bool,
        shared: bool,
    ) -> int:
        """The pooled input alone, once for all that read it in one module."""
        own = sum(inputs for _, inputs, _ in {(linear.reads, linear.inputs, linear.within) for linear in adapted})
        kept = shape.intermediate * compute_bytes * (shape.mlp == "relu")
        return kept + own // self.pool * compute_bytes

    @staticmethod
    def require_packed(spec: RunSpec, gptq: Gptq, facts: ModelFacts, paths: Iterable[str]) -> None:
        """Linears in 16 bits have no groups to fold an update into."""
        targets = {linear.name for linear in facts.targeted(spec.lora.targets)}
        plain = [path for path in sorted(paths) if path.rpartition(".")[2] in targets and gptq.of(path) is None]
        if plain:
            others = sorted(targets - {path.rpartition(".")[2] for path in plain})
            raise SpecError(
                f"{spec.model} has {len(plain)} linears in 16 bits, such as {plain[0]}, and qa-lora merges into "
                "integers",
                try_="--method gptq-lora" + (f", or --set lora.targets={','.join(others)}" if others else ""),
            )


def _require_whole_groups(spec: RunSpec, linears: Sequence[Linear], pool: int) -> None:
    whole = tuple(linear.name for linear in linears if linear.inputs % pool == 0)
    for linear in linears:
        if linear.inputs % pool:
            remedy = f"a GPTQ checkpoint with --group-size {_dividing(linear.inputs)}"
            if linear.inputs % 32:
                remedy = "lora.targets without it, or --method gptq-lora"
            if spec.lora.pool_group_size:
                remedy = "a smaller lora.pool_group_size, or none"
            raise SpecError(
                f"{linear.name} of {spec.model} has {linear.inputs} inputs, which groups of {pool} do not divide",
                try_=remedy,
                ways=[
                    {"lora.pool_group_size": None},
                    *_OTHER_GROUPS,
                    *([{"lora.targets": whole}] if whole else []),
                    _UNPOOLED,
                ],
            )


def _dividing(inputs: int) -> int:
    return next(size for size in (128, 64, 32) if inputs % size == 0)


def factor_of(pool: Pool, inputs: int, group_size: int) -> float:
    """Factor applied to the sum of a group of inputs before A reads it."""
    return {"peft": inputs / group_size**2, "mean": 1 / group_size, "sum": 1.0}[pool]


def alphas(spec: RunSpec, linears: Iterable[Linear], group_size: int) -> dict[str, float]:
    """The alpha of each linear, by leaf name, with which PEFT's own pooling computes what the spec's does."""
    return {
        linear.name: spec.lora.alpha
        * factor_of(spec.lora.pool, linear.inputs, group_size)
        / factor_of("peft", linear.inputs, group_size)
        for linear in linears
    }
