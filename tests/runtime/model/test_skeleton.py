"""Is a configuration or a tokenizer that does not belong to a model refused in a sentence, never by a traceback?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import ModelError
from qdist.runtime.data.tokenizer import open_tokenizer
from qdist.runtime.formats.packed_folder import Packing
from qdist.runtime.quantize.bitsandbytes import packed_folder, quantize
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.tensors import tensors_of
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.tiny import save_config, save_model

NF4 = Packing(bits=4, type="nf4")


def change(folder: Path, **keys: Any) -> Path:
    """Another config.json over the same weights."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


def to_torch_file(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 319}, "config.json says vocab_size 319, model.embed_tokens.weight has 320 rows"),
        ({"intermediate_size": 96}, r"config.json says intermediate_size 96, model.layers.0.mlp.\w+.weight has 128"),
        ({"num_attention_heads": 8, "head_dim": 16},
         r"config.json makes .*self_attn.\w+.weight \[(128, 64|64, 128)\] in size, the file holds \[64, 64"),
    ],
)  # fmt: skip
def test_a_size_that_is_not_the_configurations_is_named(
    keys: dict[str, Any], message: str, kind: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    if kind == "bin":
        to_torch_file(folder)
    change(folder, **keys)
    with pytest.raises(ModelError, match=message) as caught:
        tensors_of(folder, blueprint(folder))
    assert caught.value.try_ == "the config.json that came with these weights"


@pytest.mark.parametrize("packing", [NF4, Packing(bits=8), Packing(bits=16)], ids=str)
def test_so_it_is_of_a_model_that_is_packed_already(packing: Packing, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    if packing.bits < 16:
        quantize(str(folder), tmp_path / "packed", packing)
        folder = tmp_path / "packed"
    assert packed_folder(folder, packing, name="tiny").folder == folder
    for keys, message in (
        ({"vocab_size": 321}, "config.json says vocab_size 321, model.embed_tokens.weight has 320 rows"),
        ({"vocab_size": 320, "intermediate_size": 96}, r"config.json (says intermediate_size 96|makes .* in size)"),
    ):
        with pytest.raises(ModelError, match=message):
            packed_folder(change(folder, **keys), packing, name="tiny")


def test_layers_that_the_configuration_does_not_count_are_not_left_out(tmp_path: Path) -> None:
    folder = change(save_model(tmp_path / "model"), num_hidden_layers=1)
    with pytest.raises(ModelError, match="says 1 layer, the files hold 2"):
        tensors_of(folder, blueprint(folder))


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "x"}, {"dtype": 1.5}, {"rope_parameters": "x"}, {"eos_token_id": 1.5}, {"rms_norm_eps": []},
        {"initializer_range": "12"}, {"hidden_act": "unheard-of"}, {"hidden_size": 63}, {"num_hidden_layers": "2"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_transformers_cannot_compute_with_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        blueprint(change(save_config(tmp_path / "model"), **keys))
    assert caught.value.try_ == "its published config.json"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"pre_tokenizer": {"type": "FutureThing"}},
            "tokenizer.json was written by a newer version of tokenizers than 0",
        ),
        ({"model": None}, "tokenizer.json was written by a newer version of tokenizers than 0"),
        ({"version": "9.0"}, "or is damaged: Unknown tokenizer version '9.0'"),
        ({"added_tokens": None}, "the tokenizer was written by a newer version of transformers than"),
    ],
)
def test_a_tokenizer_of_a_newer_library_says_so(keys: dict[str, Any], message: str, tokenizer: Path) -> None:
    file = tokenizer / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(ModelError, match=message) as caught:
        open_tokenizer(tokenizer, "it has none")
    assert caught.value.try_ == "pip install -U tokenizers transformers"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"), [("", "Expecting value"), ("{", "Expecting property"), ("[1]", "it holds a list")]
)
def test_a_file_of_a_tokenizer_that_is_no_json_object_is_named(
    name: str, text: str, message: str, tokenizer: Path
) -> None:
    (tokenizer / name).write_text(text)
    with pytest.raises(ModelError, match=rf"{name}.*{message}"):
        open_tokenizer(tokenizer, "it has none")


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RecursionError(), MemoryError(), Exception("bare")])
def test_whatever_a_library_trips_over_is_told_with_the_folder(
    error: Exception, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ModelError, match=str(tokenizer)):
        open_tokenizer(tokenizer, "it has none")


def test_what_ends_the_process_is_no_fault_of_a_file(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_tokenizer(tokenizer, "it has none")
