"""What does a model name mean?"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from qdist.core.errors import MachineError, ModelError
from qdist.core.model.aliases import config_of
from qdist.host.sources.models import EMBEDDED, EMBEDDED_PACKAGE, find_shape, locate, public_name, shape


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder: Path, text: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of("llama-7b")) if text is None else text)
    return folder


@pytest.mark.parametrize("name", ["mine", "./mine", "mine/", "llama-7b", "owner/name"])
def test_a_folder_is_itself_whatever_its_name(name: str, here: Path) -> None:
    folder = saved(here / name)
    located = locate(name)
    assert (located.kind, located.path) == ("folder", str(folder.resolve()))
    assert located.config == config_of("llama-7b")


def test_a_gguf_file_is_itself(here: Path) -> None:
    (here / "mine.GGUF").write_bytes(b"GGUF")
    located = locate("mine.GGUF")
    assert (located.kind, located.path, located.config) == ("gguf", str(here / "mine.GGUF"), None)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("LLAMA_7B", "huggyllama/llama-7b"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_an_alias_is_its_hub_id_with_a_known_shape(name: str, hub_id: str, here: Path) -> None:
    located = locate(name)
    assert (located.kind, located.path) == ("hub", hub_id)
    assert located.config is not None


def test_any_hub_id_is_itself_with_an_unknown_shape(here: Path) -> None:
    located = locate("owner/some.model-1_b")
    assert (located.kind, located.path, located.config) == ("hub", "owner/some.model-1_b", None)


def test_the_embedded_model_is_a_file_of_its_package_or_says_how_to_get_it() -> None:
    if find_spec(EMBEDDED_PACKAGE) is None:
        with pytest.raises(MachineError, match="which is not installed"):
            locate(EMBEDDED)
    else:
        located = locate(EMBEDDED)
        assert (located.kind, located.config) == ("gguf", config_of(EMBEDDED))
        assert Path(located.path).is_file()


@pytest.mark.parametrize(
    ("name", "message", "attempt"),
    [
        ("mine.gguf", r"no file mine\.gguf", "the path of a .gguf file"),
        ("./mine", "no folder or file ./mine", "a folder with config.json, a .gguf file, an alias or a hub id"),
        (
            "/models/mine",
            "no folder or file /models/mine",
            "a folder with config.json, a .gguf file, an alias or a hub id",
        ),
        ("~/mine", "no folder or file ~/mine", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("a/b/c", "no folder or file a/b/c", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("lama-7b", "no model is called 'lama-7b'", "llama-7b"),
        ("qwen3-8", "no model is called 'qwen3-8'", "qwen3-8b"),
    ],
)
@pytest.mark.parametrize("how", [locate, shape], ids=["locate", "shape"])
def test_a_name_that_means_nothing_says_what_would(
    how: object, name: str, message: str, attempt: str, here: Path
) -> None:
    assert callable(how)
    with pytest.raises(ModelError, match=message) as caught:
        how(name)
    assert caught.value.try_ == attempt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not JSON: line 1, column 2: Expecting"),
        ("{}", "has no model_type"),
        ('{"model_type": "gpt9"}', "model_type 'gpt9'"),
    ],
)
def test_a_folder_with_a_bad_config_is_refused(text: str, message: str, here: Path) -> None:
    saved(here / "mine", text)
    with pytest.raises(ModelError, match=message):
        shape("mine")


def test_a_folder_without_a_config_is_refused(here: Path) -> None:
    (here / "mine").mkdir()
    with pytest.raises(ModelError, match=r"mine has no config\.json"):
        locate("mine")


@pytest.mark.parametrize("name", ["llama-7b", "huggyllama/llama-7b", "HuggyLlama/LLaMA-7b", "mine"])
def test_a_shape_is_known_offline(name: str, here: Path) -> None:
    saved(here / "mine")
    config, facts = shape(name)
    assert config == config_of("llama-7b")
    assert (facts.name, facts.layer_count, facts.hidden) == (name, 32, 4096)


def test_a_shape_that_only_a_hub_could_tell_is_refused(here: Path) -> None:
    assert find_shape("owner/unheard-of") is None
    with pytest.raises(ModelError, match="is not known offline") as caught:
        shape("owner/unheard-of")
    assert caught.value.try_ == "a local folder, or an alias such as llama-7b"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/tiny-lama", "models/tiny-llama"),
        ("./models/tiny-lama", "models/tiny-llama"),
        ("./modles/tiny-llama", "models/tiny-llama"),
        ("models/tiny.guf", "models/tiny.gguf"),
        ("tny.gguf", "tiny.gguf"),
        ("models/zzzz", "models/tiny-llama, models/tiny.gguf"),
        ("runs/firts", "runs/first"),
        ("my-run", "runs/my-run-2"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B/tree/main", "Qwen/Qwen2.5-7B"),
    ],
)
def test_a_path_that_is_not_there_is_never_a_hub_id_and_names_the_nearest(name: str, near: str, here: Path) -> None:
    saved(here / "models" / "tiny-llama")
    (here / "models" / "notes").mkdir()
    for file in ("models/tiny.gguf", "tiny.gguf"):
        (here / file).write_bytes(b"GGUF")
    for run in ("first", "my-run-2"):
        saved_run(here / "runs" / run)
    with pytest.raises(ModelError, match=rf"no (folder or file|file|model is called) '?{re.escape(name)}") as caught:
        locate(name)
    assert caught.value.try_ == near


def test_a_hub_id_that_is_known_stays_one_beside_a_folder_of_its_owners_name(here: Path) -> None:
    (here / "Qwen").mkdir()
    assert locate("Qwen/Qwen2.5-7B-Instruct").kind == "hub"
    with pytest.raises(ModelError, match="no folder or file Qwen/Mine, and Qwen is a folder here: it is not a hub id"):
        locate("Qwen/Mine")


def saved_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "folder", "public"),
    [
        ("llama-7b", "/hub/models--huggyllama--llama-7b/snapshots/0a1b/", "huggyllama/llama-7b"),
        ("smollm2-135m", "/cache/models/SmolLM2-135M-Instruct.Q4_1-0a1b", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/mine/tuned.gguf", "/cache/models/tuned-0a1b", "/mine/tuned.gguf"),
        ("models/mine", "/home/models/mine", "/home/models/mine"),
    ],
)
def test_a_model_is_named_as_others_know_it(name: str, folder: str, public: str) -> None:
    assert public_name(name, folder) == public


def saved_adapter(folder: Path, **settings: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_what_is_no_model_says_what_it_is_and_what_to_do(here: Path) -> None:
    saved_run(here / "begun")
    saved_adapter(saved_run(here / "my run") / "adapter")
    saved_adapter(here / "lora", base_model_name_or_path="huggyllama/llama-7b")
    saved(here / "outer" / "inner")
    (here / "outer" / "inner" / "model.safetensors").touch()
    (here / "loose.bin").touch()
    (here / "alone.gguf").write_text("no such thing")
    for name, message, attempt in (
        ("begun", "begun is a run, not a model", "qdist launch --resume --run begun, which goes on with it"),
        ("my run", "my run is a run, not a model", "qdist merge 'my run' --out DIR, and --model DIR"),
        ("my run/adapter", "my run/adapter is the adapter of a run", "qdist merge 'my run' --out DIR, and --model DIR"),
        ("lora", "lora is an adapter over huggyllama/llama-7b", "that model: --model huggyllama/llama-7b"),
        ("outer", r"outer has no config\.json", "outer/inner"),
        ("outer/inner/model.safetensors", "is a file, and no GGUF file", "outer/inner"),
        ("outer/inner/config.json", "is a file, and no GGUF file", "outer/inner"),
        ("loose.bin", "is a file, and no GGUF file", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("alone.gguf", "is not a GGUF file: it does not begin with GGUF", "download the file again"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            find_shape(name)
        assert caught.value.try_ == attempt


def test_a_gguf_file_is_one_whatever_it_is_called(here: Path) -> None:
    (here / "sha256-1f").write_bytes(b"GGUF")
    assert locate("sha256-1f").kind == "gguf"


def test_the_configuration_in_the_hubs_cache_wins_over_the_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(here), raising=False)
    named = find_shape("meta-llama/Llama-2-7b-chat-hf")
    assert named is not None
    assert (named.facts.layer_count, "shape of llama2-7b" in named.note) == (32, True)
    folder = here / "models--meta-llama--Llama-2-7b-chat-hf"
    saved(folder / "snapshots" / "f00d", json.dumps(config_of("llama2-7b") | {"num_hidden_layers": 3}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("f00d")
    cached = find_shape("meta-llama/Llama-2-7b-chat-hf")
    assert cached is not None
    assert (cached.facts.layer_count, cached.note) == (3, "")
