"""What is there of a model, and what would a launch make of it? Without torch, a hub or a single byte written."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub import constants

from qdist.core.errors import DataError, ModelError, PlanError
from qdist.core.model.aliases import config_of
from qdist.core.model.storage import packing_of
from qdist.core.planning.plan import DataFacts, Prepared, Source
from qdist.core.spec.run_spec import RunSpec, resolve
from qdist.host import files as disk
from qdist.host.launch.survey import Work, counted, expected, require_room, survey, tokenizing
from qdist.host.sources import cache
from tests.host.sources.test_gguf_header import LLAMA as LLAMA_HEADER
from tests.host.sources.test_gguf_header import header

LLAMA = 6_738_415_616
"""Parameters."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data, empty caches of qdist and of the hub that are not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n\n{"text": "three"}\n')
    return tmp_path


def spec(**settings: Any) -> RunSpec:
    return resolve({"model": "mine", "data": "data.jsonl"}, settings)


def save(folder: Path, *files: str, **config: Any) -> Path:
    """A model's small files; its weights are empty."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of("llama-7b") | config))
    for name in files:
        (folder / name).touch()
    return folder


def actions(work: tuple[Work, ...]) -> list[tuple[str, str, bool]]:
    return [(each.action, each.into, each.there is not None) for each in work]


@pytest.mark.parametrize(
    ("settings", "config", "files", "wanted"),
    [
        ({}, {}, ["model.safetensors"], [("pack", "4 bits nf4", False)]),
        ({"quant": {"double": False}}, {}, ["model.safetensors"],
         [("pack", "4 bits nf4 without double quantization", False)]),
        ({"bits": 8}, {}, ["model.safetensors"], [("pack", "8 bits int8", False)]),
        ({"bits": 16}, {}, ["model.safetensors"], []),
        ({"bits": 16}, {}, ["pytorch_model.bin"], [("pack", "a 16-bit folder", False)]),
        ({}, {"quantization_config": {"load_in_4bit": True}}, ["model.safetensors"], []),
        ({"method": "gptq-lora"}, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
         ["model.safetensors"], []),
        ({"method": "gptq-lora"}, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
         ["model.bin"], [("convert", "safetensors", False)]),
    ],
)  # fmt: skip
def test_a_folder_is_packed_unless_the_ranks_read_it_as_it_is(
    settings: dict[str, Any], config: dict[str, Any], files: list[str], wanted: list[object], here: Path
) -> None:
    folder = save(here / "mine", *files, **config)
    found = survey(spec(**settings))
    assert found.folder == folder
    assert actions(found.work) == wanted
    assert found.facts is not None
    assert found.facts.parameters == LLAMA
    assert not (here / "cache").exists()


def test_what_is_packed_already_is_found_in_the_cache(here: Path) -> None:
    folder = save(here / "mine", "model.safetensors")
    out = cache.packed_folder(folder, packing_of(spec()), name="mine")
    (missing,) = survey(spec()).work
    half = cache.work_folder(out)
    half.mkdir(parents=True)
    (half / "model-00001-of-00033.safetensors").write_bytes(b"x" * 1000)
    (begun,) = survey(spec()).work
    assert missing.size_bytes is not None
    assert begun.size_bytes == missing.size_bytes - 1000
    out.mkdir()
    (packed,) = survey(spec()).work
    assert packed.there == out
    (folder / "model.safetensors").write_bytes(b"another")
    assert actions(survey(spec()).work) == [("pack", "4 bits nf4", False)]


def test_a_hub_model_is_fetched_unless_the_hubs_cache_has_all_of_it(here: Path) -> None:
    fetch, pack = survey(spec(model="llama-7b")).work
    assert (fetch.what, fetch.there, fetch.size_bytes, fetch.folder) == (
        "huggyllama/llama-7b", None, 2 * LLAMA, here / "hub",
    )  # fmt: skip
    assert pack.size_bytes == pytest.approx(3.6 * 2**30, rel=0.01)
    snapshot = here / "hub/models--huggyllama--llama-7b/snapshots/abc"
    save(snapshot)
    refs = here / "hub/models--huggyllama--llama-7b/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert not survey(spec(model="llama-7b")).work[0].there
    (snapshot / "model.safetensors").touch()
    assert survey(spec(model="llama-7b")).work[0].there == snapshot


def test_of_a_hub_model_that_nobody_knows_only_its_name_is_told() -> None:
    found = survey(spec(model="owner/unheard-of"))
    assert (found.source, found.facts, found.folder) == (None, None, None)
    assert [(each.action, each.size_bytes) for each in found.work] == [("fetch", None)]


def test_a_gguf_file_is_converted_once(here: Path) -> None:
    (here / "mine.gguf").write_bytes(header(LLAMA_HEADER, ("token_embd.weight",)))
    found = survey(spec(model="mine.gguf"))
    assert actions(found.work) == [("convert", "a bfloat16 folder", False), ("pack", "4 bits nf4", False)]
    assert found.facts is not None
    assert found.work[0].size_bytes == 2 * found.facts.parameters
    folder = save(cache.converted_folder(here / "mine.gguf"), "model.safetensors")
    work, pack = survey(spec(model="mine.gguf")).work
    assert (work.there, pack.action) == (folder, "pack")
    assert work.size_bytes == 2 * LLAMA


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no file gone\.gguf"):
        survey(spec(model="gone.gguf"))


@pytest.mark.parametrize(
    ("needed", "said", "attempt"),
    [
        ([("convert", "cache/models", 30), ("pack", "cache/packed", 20)], "converting and packing mine needs 50.0 GiB "
         "in .*/cache, which has 40.0 GiB free", "QDIST_CACHE=FOLDER, on a disk with room"),
        ([("fetch", "hub", 50)], "fetching mine needs 50.0 GiB in .*/hub", "HF_HOME=FOLDER, on a disk with room"),
    ],
)  # fmt: skip
def test_room_is_wanted_for_everything_on_a_disk_together(
    needed: list[tuple[Any, str, int]], said: str, attempt: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 40 << 30)
    work = tuple(Work(action, "mine", "", here / folder, gib << 30) for action, folder, gib in needed)
    with pytest.raises(PlanError, match=said) as caught:
        require_room(spec(), work)
    assert caught.value.try_ == attempt
    require_room(spec(), tuple(each._replace(there=here) for each in work))
    require_room(spec(), tuple(each._replace(size_bytes=None) for each in work))


@pytest.mark.parametrize(
    ("data", "records"),
    [
        ("data.jsonl", (3,)),
        ("demo", (640,)),
        ("owner/name", None),
        ("data.jsonl:0.5,demo#40:0.5", (3, 40)),
        ("data.jsonl,owner/name", None),
    ],
)
def test_records_are_counted_where_they_are(data: str, records: tuple[int, ...] | None) -> None:
    assert counted(spec(data=data)) == records


def test_records_that_cannot_be_used_are_told_together(here: Path) -> None:
    (here / "data.jsonl").write_text('{"text": "one"}\n{\n{"words": "two"}\n')
    with pytest.raises(DataError, match=r"2 of 3 records cannot be used") as caught:
        counted(spec())
    assert [line.partition(": ")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "data.jsonl:2:1", "data.jsonl:3",
    ]  # fmt: skip


def test_data_are_expected_to_be_as_long_as_may_be(here: Path) -> None:
    save(here / "mine")
    facts = survey(spec()).facts
    assert facts is not None
    data = expected(spec(seq_len=64), facts, (20,))
    assert (data.samples, data.train_samples, data.held_out_samples, data.longest) == (20, 18, 2, 64)
    assert expected(spec(seq_len=4096), facts, (20,)).longest == 2048


def prepared(here: Path) -> Prepared:
    folder = save(here / "mine", "model.safetensors")
    paths = {name: str(here / name) for name in ("packed", "tokenizer", "tokens")}
    for path in paths.values():
        Path(path).touch()
    data = DataFacts(path=paths["tokens"], samples=3, train_samples=2, held_out_samples=1, tokens=9, longest=4)
    source = Source(
        kind="folder", path=str(folder), packed=paths["packed"], config={}, tokenizer=paths["tokenizer"], gptq=None
    )
    return Prepared(source=source, data=data, notes=("pad was missing", "packed mine to nf4, once: 9 MiB in 1 s"))


def test_what_a_launch_prepared_is_known_to_the_next_one(here: Path) -> None:
    before = prepared(here)
    folder = Path(before.source.path)
    assert cache.remembered(spec(), folder) is None
    cache.remember(spec(), before)
    found = cache.remembered(spec(gpus=2, lora={"alpha": 3}), folder)
    assert found == msgspec.structs.replace(before, notes=("pad was missing",))
    (work,) = tokenizing(spec(), None, found)
    assert (work.there, work.what) == (here / "tokens", "data.jsonl")


@pytest.mark.parametrize("settings", [{"seq_len": 64}, {"bits": 8}, {"format": "text"}, {"train": {"held_out": 0.5}}])
def test_another_setting_that_preparing_looks_at_is_another_launch(settings: dict[str, Any], here: Path) -> None:
    before = prepared(here)
    cache.remember(spec(), before)
    assert cache.remembered(spec(**settings), Path(before.source.path)) is None


@pytest.mark.parametrize("file", ["data.jsonl", "mine/model.safetensors", "mine/config.json"])
def test_another_model_or_data_are_another_launch(file: str, here: Path) -> None:
    before = prepared(here)
    cache.remember(spec(), before)
    with open(here / file, "a") as changed:
        changed.write('\n{"text": "four"}\n')
    assert cache.remembered(spec(), Path(before.source.path)) is None


def test_what_is_not_there_any_more_is_prepared_again(here: Path) -> None:
    before = prepared(here)
    cache.remember(spec(), before)
    (here / "tokens").unlink()
    assert cache.remembered(spec(), Path(before.source.path)) is None
