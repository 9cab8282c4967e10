"""Predicted and measured speed of every run of which both are known, as one table. Needs no GPU.

    python bench/predictions.py

"fitted" says which figures gave a constant of the speed model; all others are predictions.
"""

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

import msgspec

from qdist.core.machine.cluster import Rates
from qdist.core.model.aliases import lookup
from qdist.core.model.families import from_config
from qdist.core.planning.memory import TrainingShape, sizes
from qdist.core.planning.speed import Step, passes, step_seconds

H200 = Rates(matmul_flops_s=673e12, memory_bytes_s=4177e9, link_bytes_s=255e9, host_bytes_s=54e9, source="measured")
"""Of the machines of 2026-11-23, to whose launches `linear_s` is the default of 0.65 ms."""
SECOND = msgspec.structs.replace(H200, matmul_flops_s=685e12, linear_s=0.68e-3)
"""Of the machine of 2026-11-29, as the predictions that were printed on it have them."""
THIRD = msgspec.structs.replace(H200, linear_s=0.79e-3)
"""Of the machines of 2026-11-30, which nobody noted: launching as on one of the day before (docs/doctor.txt)."""
ALL = 10_000
"""More layers than any model has."""
EXPERTS = ("all-linear", "experts")


class Run(NamedTuple):
    """One measured run on one H200."""

    model: str
    micro_batch: int
    length: int
    measured: float
    """Tokens/s."""
    recomputed: int = 0
    """Layers."""
    rank: int = 64
    accumulation: int = 1
    bits: int = 4
    graphs: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    liger: bool = True
    alone: bool = False
    """Whether the passes alone were timed, without an optimizer step."""
    rates: Rates = H200
    fitted: str = ""


RUNS = (
    Run("llama-7b", 16, 512, 12_690, recomputed=ALL),
    Run("llama-7b", 16, 512, 18_801),
    Run("llama-7b", 8, 512, 16_585, accumulation=4),
    Run("llama-7b", 2, 512, 5_130, accumulation=8),
    Run("llama3-8b", 8, 512, 15_430),
    Run("llama-65b", 4, 512, 1_304, recomputed=ALL),
    Run("llama-7b", 16, 512, 7_958, recomputed=ALL, bits=8, fitted="int8"),
    Run("llama-7b", 16, 512, 13_328, recomputed=ALL, bits=16),
    Run("llama-7b", 4, 2048, 12_488, recomputed=ALL),
    Run("qwen2.5-7b", 8, 512, 11_753, recomputed=ALL),
    Run("llama-33b", 8, 512, 2_772, recomputed=ALL),
    Run("llama-7b", 16, 512, 18_191, rates=SECOND),
    Run("llama-7b", 16, 512, 12_650, recomputed=ALL, rates=SECOND),
    Run("llama-7b", 4, 2048, 17_384, rates=SECOND),
    Run("llama-7b", 1, 2048, 10_073, rates=SECOND),
    Run("llama-7b", 2, 512, 6_440, rates=SECOND),
    Run("llama-7b", 2, 512, 2_210, recomputed=ALL, rates=SECOND, fitted="checkpointing"),
    Run("qwen3-8b", 3, 777, 7_789, rank=32, accumulation=2, rates=SECOND),
    Run("mistral-7b", 4, 1024, 14_739, accumulation=4, recomputed=4, rates=SECOND),
    Run("pythia-12b", 2, 640, 6_655, accumulation=4, rates=SECOND),
    Run("bloom-7b1", 8, 512, 11_160, rates=SECOND),
    Run("qwen3-32b", 1, 1536, 2_477, accumulation=8, recomputed=13, rates=SECOND),
    Run("opt-13b", 8, 512, 6_061, bits=8, rates=SECOND),
    Run("qwen3-30b-a3b", 16, 512, 17_976, rank=16, rates=THIRD, fitted="experts"),
    Run("qwen3-30b-a3b", 16, 512, 13_465, rank=16, targets=EXPERTS, rates=THIRD),
    Run("qwen3-30b-a3b", 3, 1024, 6_110, rank=16, targets=EXPERTS, rates=THIRD),
    Run("gpt-oss-20b", 8, 512, 7_300, recomputed=ALL, rank=16, rates=THIRD, fitted="sinks"),
    Run("gpt-oss-20b", 4, 512, 7_362, accumulation=4, rank=16, rates=THIRD),
    Run("gpt-oss-20b", 3, 768, 8_000, rank=8, rates=THIRD),
    Run("gemma3-12b", 8, 512, 5_009, recomputed=ALL, rank=16, rates=THIRD),
    Run("gemma3-12b", 1, 2048, 3_225, rank=16, rates=THIRD),
    Run("qwen3.5-9b", 8, 512, 5_970, rank=16, rates=THIRD, fitted="recurrence"),
    Run("qwen3.5-9b", 2, 2048, 1_730, recomputed=ALL, rank=16, rates=THIRD, fitted="recurrence"),
    Run("phi-4", 8, 512, 5_912, recomputed=ALL, rank=16, rates=THIRD),
    Run("phi-4", 2, 1024, 7_334, rank=16, rates=THIRD),
    Run("granite-8b", 8, 512, 11_531, rank=16, rates=THIRD),
    Run("granite-8b", 2, 2048, 6_844, recomputed=ALL, rank=16, rates=THIRD),
    Run("olmo2-7b", 8, 512, 13_868, rank=16, rates=THIRD),
    Run("olmo2-7b", 2, 2048, 9_107, recomputed=ALL, rank=16, rates=THIRD),
    Run("olmo2-7b", 3, 777, 7_855, rank=32, rates=THIRD),
    Run("mistral-small-24b", 8, 512, 3_931, recomputed=ALL, rank=16, rates=THIRD),
    Run("mistral-small-24b", 2, 1024, 5_144, rank=16, rates=THIRD),
    Run("llama-7b", 1, 512, 11_050, graphs=True, alone=True),
    Run("llama-7b", 2, 512, 14_400, graphs=True, alone=True),
    Run("llama-7b", 4, 512, 16_369, graphs=True, alone=True),
    Run("llama-7b", 16, 512, 18_251, graphs=True, alone=True),
    Run("llama-7b", 1, 2048, 14_351, graphs=True, alone=True),
    Run("llama-7b", 2, 512, 9_894, graphs=True, alone=True, recomputed=ALL),
)


def predict(run: Run) -> float:
    """Tokens/s."""
    facts = from_config(lookup(run.model).config, name=run.model)
    experts = facts.expert_parameters > 0 and run.model.startswith("gpt-oss")
    job = TrainingShape(
        bits=run.bits, rank_r=run.rank, targets=run.targets, seq_len=run.length, fused_loss=run.liger,
        fused_layers=run.liger, fused_lora=True, mxfp4=experts,
    )  # fmt: skip
    own = sizes(facts, job)
    one = passes(own, run.rates, run.micro_batch, graphs=run.graphs)
    step = Step(
        counts=(facts.counts(0, facts.layer_count),), checkpointed=min(run.recomputed, facts.layer_count),
        micro_batches=run.accumulation, zero_stage=0, ranks=1, graphs=run.graphs,
    )  # fmt: skip
    seconds = step_seconds(own, run.rates, one, step)
    if run.alone:
        seconds -= step_seconds(own, run.rates, one, msgspec.structs.replace(step, micro_batches=0))
    return run.micro_batch * run.accumulation * run.length / seconds


def report(title: str, runs: Iterable[Run]) -> None:
    """A table, and how far off the predictions were."""
    print(f"\n{title}")
    errors = []
    for run in runs:
        own = predict(run)
        error = own / run.measured - 1
        errors.append((abs(error), run.fitted))
        how = " ".join((
            f"{run.micro_batch}x{run.length}", "recomputed" * (run.recomputed > 0),
            f"{run.bits} bits" * (run.bits != 4), "experts" * (run.targets == EXPERTS),
        ))  # fmt: skip
        print(f"{run.model:18} {how:22} {own:8,.0f} {run.measured:8,.0f} {error:+7.1%}  {run.fitted}")
    predicted = [error for error, fitted in errors if not fitted]
    print(f"median error {median(error for error, _ in errors):.1%}, worst {max(errors)[0]:.1%}; of {len(predicted)} "
          f"runs that fitted nothing {median(predicted):.1%} and {max(predicted):.1%}")  # fmt: skip


def main() -> None:
    """Print the tables."""
    report(
        "eager: model, run, tok/s predicted, measured, error, what it fitted", [run for run in RUNS if not run.graphs]
    )
    report("CUDA graphs", [run for run in RUNS if run.graphs])


if __name__ == "__main__":
    main()
