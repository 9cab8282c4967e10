"""Runs over one base are opened into one model; each adapter and the base answer as they do alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qdist
from qdist.core.errors import DataError, PlanError, QdistError, RunError
from qdist.core.planning.answering import Questions, answering_footprint
from qdist.core.planning.inference import Footprint, Residence
from qdist.core.sampling import Sampling
from qdist.core.text import GIB
from qdist.host.run.rundir import RunDir
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.decoder import Decoder
from qdist.runtime.infer.load import holds_copy, parts_of
from qdist.runtime.infer.ready import Ready, open_answerer, slots_beside, slots_with_room
from qdist.runtime.infer.residence import choose
from qdist.runtime.infer.scheduler import Batched
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.infer.answering import Heard, answered
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model

PROMPTS = ([5, 9, 11], [7, 8], list(range(5, 30)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("runs")
    model = save_model(folder / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    data = save_data(folder / "d.jsonl")
    settings: dict[str, dict[str, Any]] = {
        "wide.1": {"lora__r": 8},
        "narrow": {"lora__r": 2, "lora__targets": ("q_proj", "down_proj"), "seed": 3},
    }
    return {
        name: adapted_run(real_job(model, data, folder / name, seq_len=64, **own), scale=0.2)[0]
        for name, own in settings.items()
    }


def expected(model: Any) -> list[list[int]]:
    """Greedy answers by transformers, to their ends."""
    ends = {1, 3}
    found = list[list[int]]()
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=[1, 3]
        )
        written = out[0, len(prompt) :].tolist()
        found.append(written[: next((place for place, token in enumerate(written) if token in ends), 10)])
    return found


def tokens_of(ready: Ready, *names: str) -> list[list[list[int]]]:
    """The answers of each adapter, all asked at once."""
    asked = [Question(prompt, Sampling(max_new_tokens=10), name) for name in names for prompt in PROMPTS]
    heard = [own.tokens for own in answered(ready.answerer, *asked)]
    return [heard[start : start + len(PROMPTS)] for start in range(0, len(heard), len(PROMPTS))]


def test_each_adapter_of_several_runs_and_their_base_answer_as_alone(runs: dict[str, RunDir]) -> None:
    ready = open_answerer({name: str(run.path) for name, run in runs.items()}, slots=4, tokens=64)
    assert isinstance(ready.answerer, Batched)
    assert ready.answerer.adapters == ("wide.1", "narrow")
    assert (ready.answerer.slots, ready.answerer.positions) == (4, 64)
    assert list(ready.speeches) == ["", "wide.1", "narrow"]
    assert ready.where.startswith("backbone on the CPU; 4 answers at a time, of up to 64 tokens with their prompts")
    wide, narrow = (qdist.load(run.path)[0] for run in runs.values())
    with wide.disable_adapter():
        base = expected(wide)
    wanted = [base, expected(wide), expected(narrow)]
    assert tokens_of(ready, "", "wide.1", "narrow") == wanted
    assert len({str(own) for own in wanted}) == 3, "each answers differently"


def test_one_run_answers_with_its_adapter_and_without(runs: dict[str, RunDir]) -> None:
    ready = open_answerer({"a": str(runs["narrow"].path)}, slots=2, tokens=10_000)
    assert ready.answerer.positions == 128, "the model has no more"
    model, _ = qdist.load(runs["narrow"].path)
    assert tokens_of(ready, "a") == [expected(model)]
    assert ready.speeches["a"].wording.ends == (3,)


def test_a_cache_without_room_is_told_with_its_size(runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(_: Decoder) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Decoder, "prepare", prepare)
    with pytest.raises(PlanError, match="keys and values of 2 answers of 64 tokens do not fit"):
        open_answerer({"a": str(runs["narrow"].path)}, slots=2, tokens=64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_and_a_run_compute_in_the_dtype_that_is_asked_for(runs: dict[str, RunDir], dtype: str) -> None:
    run = runs["narrow"].path
    ready = open_answerer({"a": str(run)}, slots=1, tokens=64, dtype=dtype)
    assert f"nf4 weights unpacked to {dtype}" in ready.where
    model, _ = qdist.load(run, dtype=dtype)
    assert tokens_of(ready, "a") == [expected(model)]
    plain = open_answerer({"": str(run.parent / "model")}, slots=1, tokens=64, dtype=dtype)
    assert tokens_of(plain, "") == [expected(qdist.load(run.parent / "model", dtype=dtype)[0])]


@pytest.mark.parametrize("name", ["", "tiny"])
def test_a_plain_model_answers_in_a_batch_by_any_name(runs: dict[str, RunDir], name: str) -> None:
    folder = runs["narrow"].path.parent / "model"
    ready = open_answerer({name: str(folder)}, slots=3, tokens=64)
    assert isinstance(ready.answerer, Batched)
    assert tokens_of(ready, "", name) == [expected(qdist.load(folder)[0])] * 2
    assert set(ready.speeches) == {"", name}
    with pytest.raises(DataError, match="no adapter called 'other'"):
        ready.answerer.submit(Question([5], adapter="other"), Heard())


def test_what_cannot_answer_together_is_refused_before_weights_are_read(
    runs: dict[str, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdist.runtime.infer.load.load_backbone", lambda *_, **__: pytest.fail("weights were read"))
    own = {name: str(run.path) for name, run in runs.items()}
    other = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False), seed=5)
    stranger, _ = adapted_run(real_job(other, save_data(tmp_path / "d.jsonl"), tmp_path / "run", seq_len=64))
    model = str(runs["narrow"].path.parent / "model")
    targets: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({}, {}, "nothing to answer with"),
        ({"": own["narrow"]}, {}, "has no name"),
        ({"a": own["narrow"], "b": model}, {}, "is not a run"),
        ({**own, "c": str(stranger.path)}, {}, "have different bases: weights with digest"),
        (own, {"engine": "vllm"}, "no engine called 'vllm'"),
        (own, {"dtype": "int4"}, "dtype cannot be 'int4'"),
        (own, {"engine": "llama.cpp", "dtype": "float32"}, "a dtype of its own, not in float32"),
    ]
    for asked, options, said in targets:
        with pytest.raises(QdistError, match=said) as caught:
            open_answerer(asked, slots=2, tokens=64, **options)
        assert caught.value.try_


def test_an_adapter_with_rows_of_the_vocabulary_answers_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    data = save_data(tmp_path / "d.jsonl")
    pair = [adapted_run(real_job(model, data, tmp_path / name, seq_len=64, new_tokens=("<call>",)))[0] for name in "ab"]
    with pytest.raises(RunError, match="an adapter of rows of the vocabulary answers alone"):
        open_answerer({run.path.name: str(run.path) for run in pair}, slots=2, tokens=64)
    ready = open_answerer({"a": str(pair[0].path)}, slots=2, tokens=64)
    assert tokens_of(ready, "a") == [expected(qdist.load(pair[0].path)[0])]


@pytest.mark.parametrize(
    ("rooms", "asked", "expected", "offloaded"),
    [(16, 16, 16, 0), (6, 16, 4, 0), (1, 16, 1, 0), (0, 16, 16, 3), (2, 1, 1, 0)],
    ids=["enough", "some", "one", "none", "one asked for"],
)
def test_there_are_as_many_answers_at_a_time_as_need_no_layer_offloaded(
    rooms: int, asked: int, expected: int, offloaded: int
) -> None:
    """rooms: answers that there is memory for; beyond three times as many there is none to offload to."""

    def place(slots: int) -> Residence:
        if rooms and slots > 3 * rooms:
            raise PlanError("nowhere")
        return Residence(layer_gpu=(0,) * 4, offloaded=(0, 1, 2) if slots > rooms else ())

    slots, residence = slots_with_room(asked, place)
    assert (slots, len(residence.offloaded)) == (expected, offloaded)


def test_the_room_that_is_asked_for_is_what_a_plan_for_inference_counts(
    runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Footprint]()

    def noted(parts: Footprint, **named: Any) -> Residence:
        asked.append(parts)
        return choose(parts, **named)

    monkeypatch.setattr("qdist.runtime.infer.ready.choose", noted)
    open_answerer({name: str(run.path) for name, run in runs.items()}, slots=4, tokens=64)
    plan = runs["wide.1"].plan()
    parts = parts_of(plan, torch.float32, rank_r=8 + 2)
    assert asked == [answering_footprint(parts, Questions(batch=4, context=64, adapters=2))]


def test_a_plain_model_has_as_many_answers_at_a_time_as_a_gpu_has_room_for(
    runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def holds(folder: Path, dtype: str, tokens: int, free: int, cap_bytes: int | None) -> bool:
        return tokens <= free

    monkeypatch.setattr("qdist.runtime.infer.ready.has_room", holds)
    model = runs["narrow"].plan().source.path
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for rooms, expected in (((100, 300), 4), ((5000,), 16), ((64,), 1), ((10,), 16)):
        monkeypatch.setattr("qdist.runtime.infer.ready.free_bytes", lambda rooms=rooms: rooms)
        assert slots_beside(model, 16, 64, "auto", None) == expected


def test_a_copy_of_a_plain_model_needs_room_for_its_keys_and_values(runs: dict[str, RunDir]) -> None:
    model = runs["narrow"].plan().source.path
    free = 3 * GIB
    assert holds_copy(model, free, Questions(1, 64, 0), max_memory_bytes=None)
    assert not holds_copy(model, free, Questions(64, 10**6, 0), max_memory_bytes=None)
    assert not holds_copy(model, free, 64 * 10**6, max_memory_bytes=None)
    most = next(
        count for count in range(10**5, 10**8, 10**5) if not holds_copy(model, free, count, max_memory_bytes=None)
    )
    assert not holds_copy(model, free, most // 2 + 10**5, dtype="float32", max_memory_bytes=None)
