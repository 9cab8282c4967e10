"""Does every setting say what it is for, and is it found by what people call it?"""

import pytest

from qdist.core.errors import SpecError
from qdist.core.spec.lookup import all_settings, find_settings, sections
from qdist.core.spec.suggest import OTHER_NAMES, RELATED_NAMES

EVERY = {each.key: each for each in all_settings()}


@pytest.mark.parametrize("key", EVERY)
def test_a_setting_is_described_in_a_sentence_with_its_values(key: str) -> None:
    setting = EVERY[key]
    assert setting.text.endswith(".")
    assert not setting.text.startswith("Of ")
    assert setting.accepted


@pytest.mark.parametrize(
    ("key", "accepted", "default"),
    [
        ("lora.r", "integer >= 1", "64"),
        ("lora.dropout", "number >= 0, < 1", "0"),
        ("optim.lr", "number > 0", "0.0002"),
        ("quant.double", "true, false", "true"),
        ("placement", "replicate, shard, split", "auto"),
        ("lora.targets", "names with commas", "all-linear"),
        ("trackers", "mlflow, tensorboard, trackio, wandb; several with commas", ""),
        ("seq_len", "integer >= 8", "512"),
        ("model", "text", ""),
    ],
)
def test_a_setting_says_its_values_and_its_default(key: str, accepted: str, default: str) -> None:
    assert (EVERY[key].accepted, EVERY[key].default) == (accepted, default)


@pytest.mark.parametrize("name", [*OTHER_NAMES, *RELATED_NAMES])
def test_what_another_program_calls_a_setting_finds_it_first(name: str) -> None:
    meant = {**OTHER_NAMES, **RELATED_NAMES}[name]
    assert find_settings(name)[0] is not None
    assert find_settings(f"--{name.replace('_', '-')}")[0].key == find_settings(name)[0].key == meant


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("lora.r", ["lora.r"]),
        ("warm", ["optim.warmup_steps", "optim.schedule"]),
        ("zero", ["zero.stage", "zero.offload"]),
        ("Heartbeat", ["train.stuck_seconds"]),
        ("paged_adamw_8bit", ["optim.name"]),
    ],
)
def test_a_word_finds_settings_by_key_and_text(word: str, keys: list[str]) -> None:
    assert [each.key for each in find_settings(word)][: len(keys)] == keys


def test_a_word_that_no_setting_has_is_refused() -> None:
    with pytest.raises(SpecError, match="no setting matches 'zzz'"):
        find_settings("zzz")


def test_every_section_says_what_it_is_for() -> None:
    assert {each.section for each in EVERY.values()} == set(sections())
    assert all(text.endswith(".") for text in sections().values())
