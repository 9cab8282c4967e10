"""Which models can keep the samples of one row apart?"""

import msgspec
import pytest

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.packing import packs_samples


def facts_of(alias: str) -> ModelFacts:
    return from_config(config_of(alias), name=alias)


@pytest.mark.parametrize(
    ("alias", "reason"),
    [
        ("llama-7b", ""), ("mistral-7b", ""), ("qwen3-8b", ""), ("gemma3-1b", ""), ("gpt2", ""), ("opt-125m", ""),
        ("pythia-160m", ""), ("glm4-9b", ""), ("phi4", ""), ("qwen3-30b-a3b", ""),
        ("gemma2-2b", "softcap"), ("gemma4-31b", "heads of 512"),
        ("bloom-560m", "writes its attention scores out"), ("baichuan-13b", "code of its own"),
        ("baichuan-7b", "code of its own"), ("gpt-oss-20b", "attention sinks"), ("qwen3.5-9b", "layers whose state"),
    ],
)  # fmt: skip
def test_samples_are_kept_apart_where_attention_alone_mixes_tokens_and_a_kernel_can(alias: str, reason: str) -> None:
    found = packs_samples(facts_of(alias))
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_type_that_is_known_from_its_class_alone_is_not_packed() -> None:
    assert packs_samples(msgspec.structs.replace(facts_of("llama-7b"), family="nemotron")).startswith("is of a type")
