"""What does a model name mean?"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from qdist.core.errors import MachineError, ModelError
from qdist.core.models import config_of
from qdist.host.sources import EMBEDDED, EMBEDDED_PACKAGE, locate, shape


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
    (here / "mine.GGUF").touch()
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
        ("./mine", "no folder ./mine", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("/models/mine", "no folder /models/mine", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("~/mine", "no folder ~/mine", "a folder with config.json, a .gguf file, an alias or a hub id"),
        ("a/b/c", "no folder a/b/c", "a folder with config.json, a .gguf file, an alias or a hub id"),
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
    [("{", r"config\.json: Expecting"), ("{}", "has no model_type"), ('{"model_type": "gpt9"}', "model_type 'gpt9'")],
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
    assert (facts.name, facts.layers, facts.hidden) == (name, 32, 4096)


@pytest.mark.parametrize("name", ["owner/unheard-of", "mine.gguf"])
def test_a_shape_that_only_weights_or_a_hub_could_tell_is_refused(name: str, here: Path) -> None:
    (here / "mine.gguf").touch()
    with pytest.raises(ModelError, match="is not known offline") as caught:
        shape(name)
    assert caught.value.try_ == "a local folder, or an alias such as llama-7b"
