"""Data sets of a hub, as the package datasets itself loads them: here from a folder in place of the hub."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError
from qdist.host.data.hub import hub_data, hub_identity, hub_records, is_out_of_reach

datasets = pytest.importorskip("datasets")
CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
- config_name: code
  data_files: code.jsonl
---
"""


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for owner/name: 200 records to train on, 3 to test, and a subset of 2."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, count in (("train", 200), ("test", 3), ("code", 2)):
        lines = (json.dumps({"instruction": f"{name} {number}", "output": "yes"}) for number in range(count))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "README.md").write_text(CARD)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("load_dataset", "load_dataset_builder", "get_dataset_config_names"):
        monkeypatch.setattr(datasets, name, there(getattr(datasets, name), folder))
    monkeypatch.setattr("qdist.host.data.hub.is_out_of_reach", lambda address: False)
    datasets.disable_progress_bars()
    return folder


def there(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def asked(path: str, **options: Any) -> Any:
        if path != "owner/name":
            raise ConnectionError(f"Couldn't reach {path}")
        return function(str(folder), **options)

    return asked


def texts(source: str) -> list[str]:
    return [str(record["instruction"]) for _, record in hub_records(hub_data(source)) if isinstance(record, dict)]


@pytest.mark.parametrize(
    ("source", "first", "count"),
    [
        ("owner/name", "train 0", 200),
        ("owner/name@test", "test 0", 3),
        ("owner/name:test", "test 0", 3),
        ("owner/name:code", "code 0", 2),
        ("owner/name:code@train", "code 0", 2),
        ("owner/name:plain@train[:1%]", "train 0", 2),
        ("owner/name@train[10:15]", "train 10", 5),
    ],
)
def test_subsets_splits_and_slices_are_those_of_the_package(source: str, first: str, count: int) -> None:
    found = texts(source)
    assert (found[0], len(found)) == (first, count)


@pytest.mark.parametrize("source", ["owner/name:nothing", "owner/name@nothing", "owner/name:nothing@train"])
def test_what_is_not_there_is_told_in_a_sentence(source: str) -> None:
    with pytest.raises(DataError) as caught:
        texts(source)
    assert caught.value.message.startswith(f"{source} is no file here, and the hub did not give it: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("offline", "tried"), [("", "a connection to huggingface.co"), ("1", "unset HF_HUB_OFFLINE")])
def test_a_hub_that_is_not_reached_is_not_said_to_lack_the_data(
    offline: str, tried: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(DataError, match=r"^a/b is no file here, and the hub cannot be reached: ") as caught:
        texts("a/b")
    assert caught.value.try_.startswith(tried)


def test_a_data_set_is_known_by_its_subset_and_split() -> None:
    names = ("owner/name", "owner/name:code", "owner/name@test", "owner/name@train[:1%]")
    assert len({hub_identity(hub_data(name)) for name in names}) == len(names)
    assert hub_identity(hub_data("owner/name")) == hub_identity(hub_data("owner/name@train"))


@pytest.mark.parametrize("away", [True, False])
def test_a_hub_out_of_reach_is_not_waited_for(away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    seen: list[tuple[bool, bool]] = []

    def load_dataset(name: str, **_: Any) -> list[dict[str, str]]:
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("qdist.host.data.hub.is_out_of_reach", lambda address: away)
    assert len(list(hub_records(hub_data("owner/name")))) == 1
    assert seen == [(away, away)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_an_address_where_nobody_listens_is_out_of_reach() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert is_out_of_reach(f"http://127.0.0.1:{port}")
