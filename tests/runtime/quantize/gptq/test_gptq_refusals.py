"""What `qdist quantize --method gptq` and runs over GPTQ checkpoints refuse, and in which words."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qdist
from qdist.core.errors import ModelError, QdistError, SpecError
from qdist.core.model.gptq import Gptq, Shape
from qdist.core.model.storage import Packing
from qdist.core.requests import GptqSettings
from qdist.core.spec.run_spec import nest, resolve
from qdist.runtime.quantize.bitsandbytes import quantize
from qdist.runtime.quantize.gptq.make import make
from qdist.runtime.quantize.source import is_finite
from qdist.runtime.train.prepare import prepare
from tests.runtime.gptq_files import save_gptq
from tests.runtime.tiny import real_job, save_data, save_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return save_model(folder / "plain")


@pytest.fixture(scope="module")
def whole(folder: Path, plain: Path) -> Path:
    return save_gptq(folder / "whole", Gptq(shape=Shape(4, 32)), plain=plain)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return save_data(folder / "d.jsonl")


def quantized(model: Path, data: Path, out: Path) -> Any:
    return make(str(model), out, GptqSettings(data=str(data), samples=2, seq_len=32, group_size=32))


def spoil(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refused_by_launch(model: Path, data: Path, tmp_path: Path, **settings: Any) -> QdistError:
    with pytest.raises(QdistError) as caught:
        real_job(model, data, tmp_path / "run", **{"method": "gptq-lora", **settings})
    return caught.value


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"bits": 4,', "quantize_config.json is not JSON: line 1, column 12: Expecting property name"),
        (b'{"bits": "\xff"}', "quantize_config.json is not text: byte 0xff at position 10 is not UTF-8"),
        (b"[4]", "quantize_config.json is not a JSON object: it holds a list"),
        (b"null", "quantize_config.json is not a JSON object: it holds null"),
    ],
)
def test_a_quantize_config_that_cannot_be_read_is_named(
    whole: Path, data: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    model = shutil.copytree(whole, tmp_path / "spoilt")
    (model / "quantize_config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        qdist.load(model)
    for error in (caught.value, refused_by_launch(model, data, tmp_path)):
        assert f"{model}/{says}" in error.message
        assert error.try_ == "download the model again"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", torch.nan),
        ("model.embed_tokens.weight", torch.inf),
        ("lm_head.weight", -torch.inf),
        ("model.layers.1.input_layernorm.weight", torch.nan),
    ],
)
def test_nan_in_what_is_not_quantized_is_found_when_a_checkpoint_is_looked_through(
    whole: Path, data: Path, tmp_path: Path, name: str, value: float
) -> None:
    model = shutil.copytree(whole, tmp_path / "spoilt")
    spoil(model, name, value)
    error = refused_by_launch(model, data, tmp_path)
    assert error.message.startswith(f"{model}: {name} holds NaN or infinite numbers: 1 value of ")
    assert error.try_.startswith("download the checkpoint again")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_outside_of_layers_ends_quantizing_before_the_first_of_them(
    plain: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(plain, tmp_path / "spoilt")
    spoil(model, name, torch.nan)
    with pytest.raises(ModelError) as caught:
        quantized(model, data, tmp_path / "out")
    assert caught.value.message.startswith(f"{name} holds NaN or infinite numbers: 1 value of ")
    assert caught.value.try_ == "download the model again"
    assert not (tmp_path / "out").exists()
    assert "layer" not in capsys.readouterr().err


def test_nan_that_no_sample_meets_ends_quantizing_where_it_is_copied(data: Path, tmp_path: Path) -> None:
    """A bias of the last linear: no other reads what it gives."""
    model = save_model(tmp_path / "spoilt", attention_bias=True, mlp_bias=True)
    spoil(model, "model.layers.1.mlp.down_proj.bias", torch.inf)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.bias holds NaN or infinite numbers"):
        quantized(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_of_many_is_enough(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(70, 33, dtype=dtype)
    tensor[0, 0] = torch.finfo(dtype).max
    assert is_finite(tensor)
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    assert is_finite(torch.tensor([True, False]))
    tensor[51, 7] = value
    assert not is_finite(tensor)


def without_tokenizer(plain: Path, to: Path, *, config: str | None = None) -> Path:
    model = shutil.copytree(plain, to)
    for file in model.glob("tokenizer*"):
        file.unlink()
    if config is not None:
        (model / "tokenizer.json").write_text(config)
    return model


def test_a_model_without_a_tokenizer_is_told_in_a_whole_sentence(plain: Path, data: Path, tmp_path: Path) -> None:
    model = without_tokenizer(plain, tmp_path / "mute")
    with pytest.raises(ModelError) as caught:
        quantized(model, data, tmp_path / "out")
    launched = refused_by_launch(model, data, tmp_path, method="qlora")
    assert caught.value.message == f"{model} has no tokenizer to read calibration data with"
    assert launched.message == f"{model} has no tokenizer to read data with"
    assert caught.value.try_ == launched.try_ == "put its tokenizer.json beside the weights"


def test_what_is_wrong_with_a_tokenizer_is_told(plain: Path, data: Path, tmp_path: Path) -> None:
    model = without_tokenizer(plain, tmp_path / "cut", config="{")
    with pytest.raises(ModelError, match=r"cut/tokenizer\.json is not JSON: line 1, column 2: Expecting property name"):
        quantized(model, data, tmp_path / "out")


def test_a_model_that_bitsandbytes_packed_is_not_to_be_quantized_again(plain: Path, data: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    quantize(str(plain), packed, Packing(bits=4))
    error = refused_by_launch(packed, data, tmp_path)
    assert isinstance(error, ModelError)
    assert "is not a GPTQ checkpoint" in error.message
    assert error.try_.startswith("the 16-bit model that it was made from")
    assert f"qdist quantize {packed}" not in error.try_
    with pytest.raises(ModelError, match="is quantized already, with bitsandbytes"):
        quantized(packed, data, tmp_path / "out")


def test_a_plain_model_is_to_be_quantized(plain: Path, data: Path, tmp_path: Path) -> None:
    assert f"qdist quantize {plain} --method gptq" in refused_by_launch(plain, data, tmp_path).try_


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 16}, "gptq-lora has backbones of 2, 3, 4 or 8 bits, not 16"),
        ({"quant.double": False}, "quant.type and quant.double describe NF4"),
    ],
)
def test_nobody_with_a_checkpoint_is_sent_to_a_method_that_refuses_it(
    whole: Path, data: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        resolve(nest({"model": str(whole), "method": "gptq-lora", **settings}))
    assert caught.value.try_
    assert "qlora" not in caught.value.try_
    with pytest.raises(SpecError, match="is a GPTQ checkpoint"):
        prepare(resolve(nest({"model": str(whole), "data": str(data), "method": "qlora"})))
