"""Does a hub get what loading an adapter or a model takes, and nothing else; and is what it answers told?"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.errors import JobError, MachineError, QdistError, RunError, SpecError
from qdist.host.hub.push import check_name, files_to_push, folder_of, push, require_card, require_login
from tests.host.hub.fake_hub import TOKEN, FakeHub, fake_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "/home/me/models/tiny"}')
    (folder / "README.md").write_text("---\ntags: []\n---\n# Mine\n")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("optimizer.pt", "optimizer.safetensors", "trainer_state.json", ".secret", "notes.txt"):
        (folder / name).write_text("not for others")
    (folder / "checkpoint-1").mkdir()
    return folder


def pushed(folder: Path, repo: str = "me/alpaca", *, private: bool = False, revision: str = "main") -> str:
    return push(files_to_push(folder), repo, private=private, revision=revision, base="")


def test_weights_configurations_tokenizer_and_card_go_up_in_one_commit(hub: FakeHub, adapter: Path) -> None:
    assert pushed(adapter) == f"{hub.address}/me/alpaca"
    files = hub.files["me/alpaca"]["main"]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert files["adapter_model.safetensors"] == b"weights"
    assert hub.commits == ["Adapter, by qdist"]


def test_what_stays_is_named(adapter: Path) -> None:
    left = files_to_push(adapter).left_out
    assert set(left) == {
        ".secret", "checkpoint-1", "notes.txt", "optimizer.pt", "optimizer.safetensors", "trainer_state.json",
    }  # fmt: skip


def test_no_place_on_this_machine_goes_up(hub: FakeHub, adapter: Path) -> None:
    pushed(adapter)
    config = json.loads(hub.files["me/alpaca"]["main"]["adapter_config.json"])
    assert config == {"r": 8, "base_model_name_or_path": "tiny"}
    push(files_to_push(adapter), "me/other", private=False, revision="main", base="owner/tiny")
    config = json.loads(hub.files["me/other"]["main"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert "/home/me" in (adapter / "adapter_config.json").read_text()  # what is here stays as it is


@pytest.mark.parametrize(
    ("name", "content", "public"),
    [
        ("quantize_config.json", {"model_name_or_path": "/home/me/tiny"}, {"model_name_or_path": "tiny"}),
        ("tokenizer_config.json", {"name_or_path": "../me/tiny"}, {"name_or_path": "tiny"}),
        ("generation_config.json", {"_name_or_path": "~/tiny"}, {"_name_or_path": "tiny"}),
        ("tokenizer_config.json", {"a": [{"_name_or_path": "/home/me/t"}]}, {"a": [{"_name_or_path": "t"}]}),
        ("tokenizer_config.json", {"added": {"content": "/"}}, {"added": {"content": "/"}}),
    ],
)  # fmt: skip
def test_no_place_goes_up_in_any_configuration(
    hub: FakeHub, adapter: Path, name: str, content: dict[str, object], public: dict[str, object]
) -> None:
    (adapter / name).write_text(json.dumps(content))
    pushed(adapter)
    assert json.loads(hub.files["me/alpaca"]["main"][name]) == public


def test_a_merged_model_goes_up_with_the_files_that_its_index_names(hub: FakeHub, tmp_path: Path) -> None:
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for name in (*weights.values(), "model-3.safetensors", "README.md", "checksums.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "config.json").write_text('{"_name_or_path": "/home/me/tiny"}')
    pushed(tmp_path)
    files = hub.files["me/alpaca"]["main"]
    assert sorted(files) == [
        "README.md", "checksums.json", "config.json", "model-1.safetensors", "model-2.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    assert json.loads(files["config.json"]) == {"_name_or_path": "tiny"}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no model-2\.safetensors"):
        files_to_push(tmp_path)


def test_a_branch_is_made_and_written(hub: FakeHub, adapter: Path) -> None:
    assert pushed(adapter, revision="v2") == f"{hub.address}/me/alpaca/tree/v2"
    assert hub.files["me/alpaca"]["main"] == {}
    assert "README.md" in hub.files["me/alpaca"]["v2"]


def test_a_private_adapter_never_goes_into_a_public_repository(hub: FakeHub, adapter: Path) -> None:
    pushed(adapter, "me/private", private=True)
    assert hub.private["me/private"]
    pushed(adapter, "me/private", private=True)
    pushed(adapter, "me/public")
    commits = len(hub.commits)
    with pytest.raises(RunError, match="me/public is there already, and public"):
        pushed(adapter, "me/public", private=True)
    assert len(hub.commits) == commits


@pytest.mark.parametrize(
    ("part", "status", "kind", "said"),
    [
        ("create", 401, MachineError, "the hub does not take this token: said by the hub"),
        ("create", 403, RunError, "this token may not write to me/alpaca: said by the hub"),
        ("create", 404, RunError, "the hub has no me/alpaca, or no me"),
        ("commit", 409, RunError, "me/alpaca was changed meanwhile"),
        ("commit", 413, JobError, "the hub answered with status 413"),
        ("validate", 400, RunError, "the hub does not take the upload"),
    ],
)
def test_what_the_hub_refuses_is_told(
    part: str, status: int, kind: type[QdistError], said: str, hub: FakeHub, adapter: Path
) -> None:
    hub.refusing[part] = status
    with pytest.raises(kind, match=said) as raised:
        pushed(adapter)
    assert raised.value.try_
    assert hub.commits == []


def test_a_hub_that_is_not_there_is_told(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as gone:
        address = gone.address
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(MachineError, match="the hub cannot be reached"):
        pushed(adapter)


def test_without_a_token_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(MachineError, match="no token of the hub is known") as raised:
        require_login()
    assert raised.value.try_ == "hf auth login, or HF_TOKEN in the environment"


@pytest.mark.parametrize(
    "name", ["alpaca", "me/", "/x", "a/b/c", "me/al paca", "me/..", "../x", "me/x.git", "-a/b", "a/b--c"]
)
def test_a_name_that_no_hub_has_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="is not OWNER/NAME"):
        check_name(name)


def test_a_folder_without_a_card_is_refused(adapter: Path) -> None:
    (adapter / "README.md").unlink()
    with pytest.raises(RunError, match="has no model card"):
        require_card(files_to_push(adapter))


def test_a_folder_that_is_neither_run_nor_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    assert folder_of(str(adapter), "adapter") == adapter
    with pytest.raises(RunError, match="is not a run"):
        folder_of(str(tmp_path / "nothing"), "adapter")
