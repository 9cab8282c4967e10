"""Peaks of today's models as one H200 measured them, beside what a plan of the same layout says."""

from statistics import median
from typing import Any

import msgspec
import pytest

from qdist.core.machine.cluster import hypothetical
from qdist.core.model.aliases import lookup
from qdist.core.model.families import from_config
from qdist.core.planning.plan import Source
from qdist.core.planning.planner import make_plan
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import GIB

EVERYTHING = ["all-linear", "experts"]
MEASURED: dict[str, tuple[str, tuple[int, int], bool, dict[str, Any], float]] = {
    # name: model, micro-batch x length, all layers recomputed or none, other settings, GiB (bench/runs.py, 2026-11-30)
    "gemma3-12b recomputed": ("gemma3-12b", (8, 512), True, {}, 10.89),
    "gemma3-12b beyond its window": ("gemma3-12b", (1, 2048), False, {}, 25.77),  # keys are repeated there: -3.6 %
    "qwen3-30b-a3b": ("qwen3-30b-a3b", (16, 512), False, {}, 42.14),
    "qwen3-30b-a3b with experts": ("qwen3-30b-a3b", (16, 512), False, {"lora.targets": EVERYTHING}, 51.23),
    "qwen3-30b-a3b, other shape": ("qwen3-30b-a3b", (3, 1024), False, {"lora.targets": EVERYTHING}, 34.41),
    "qwen3.5-9b": ("qwen3.5-9b", (8, 512), False, {}, 58.63),
    "qwen3.5-9b recomputed": ("qwen3.5-9b", (2, 2048), True, {}, 11.47),
    "phi-4 recomputed": ("phi-4", (8, 512), True, {}, 12.66),
    "phi-4": ("phi-4", (2, 1024), False, {}, 24.51),
    "gpt-oss-20b recomputed": ("gpt-oss-20b", (8, 512), True, {}, 16.46),
    "gpt-oss-20b, other shape": ("gpt-oss-20b", (3, 768), False, {"lora.r": 8}, 25.05),
    "granite-8b": ("granite-8b", (8, 512), False, {}, 25.70),
    "granite-8b recomputed": ("granite-8b", (2, 2048), True, {}, 7.58),
    "olmo2-7b": ("olmo2-7b", (8, 512), False, {}, 26.21),
    "olmo2-7b recomputed": ("olmo2-7b", (2, 2048), True, {}, 7.70),
    "olmo2-7b, other shape": ("olmo2-7b", (3, 777), False, {"lora.r": 32}, 18.06),
    "mistral-small-24b recomputed": ("mistral-small-24b", (8, 512), True, {}, 18.14),
    "mistral-small-24b, other shape": ("mistral-small-24b", (2, 1024), False, {}, 35.18),
}


def error_of(name: str) -> float:
    """Predicted over measured bytes, less one."""
    model, (micro_batch, length), recomputed, more, gib = MEASURED[name]
    given = {
        "model": model, "load_format": "dummy", "run": "runs/x", "steps": 6, "seq_len": length, "lora.r": 16,
        "micro_batch": micro_batch, "global_batch": micro_batch, "train.checkpointing": recomputed,
        "train.held_out": 0.0, "graphs": False, **more,
    }  # fmt: skip
    config = lookup(model).config
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    machine = hypothetical(1, 141 * GIB, name="NVIDIA H200")
    spec, facts = resolve(nest(given)), from_config(config, name=model)
    (expected,) = make_plan(spec, source, facts, machine, None, has_liger=True).ranks[0].expected
    assert msgspec.structs.asdict(expected)["margin"] == 0
    return expected.total / (gib * GIB) - 1


@pytest.mark.parametrize("name", MEASURED)
def test_a_plan_is_within_five_percent_of_the_measured_peak(name: str) -> None:
    assert error_of(name) == pytest.approx(0.0, abs=0.05)


def test_plans_are_within_two_percent_in_the_median() -> None:
    assert median(abs(error_of(name)) for name in MEASURED) < 0.02
