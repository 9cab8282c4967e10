import copy
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch

from qdist.core.errors import MachineError
from qdist.core.model.storage import GgufType
from qdist.runtime.exports.gguf import quantizer
from qdist.runtime.exports.gguf.export import check_gguf
from qdist.runtime.exports.gguf.file import Kind, write_gguf
from qdist.runtime.exports.gguf.metadata import rope_of
from qdist.runtime.exports.gguf.quantizer import MIXTURES, ROUNDED_BY_LLAMA_CPP, Place, Type, mixed_type
from qdist.runtime.exports.gguf.tensors import facts_of, stored_tensors
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.exports.gguf.read_by_llama_cpp import Asked, read
from tests.runtime.exports.gguf.test_llama_cpp import IDS, divergence
from tests.runtime.exports.gguf.test_tokenizer import saved
from tests.runtime.gguf_models import config_of, fields, model_of, tensors_of

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "initializer_range": 0.06}


def place(part: str, layer: int = 0, *, layers: int = 32, shared: int = 4, tied: bool = False) -> Place:
    return Place(part, layer, layers, shared, tied)


@pytest.mark.parametrize(
    ("kind", "where", "columns", "wanted"),
    [
        ("q4_k_m", place("ffn_up"), 4096, "Q4_K"),
        ("q4_k_m", place("ffn_down", 3), 4096, "Q6_K"),
        ("q4_k_m", place("ffn_down", 4), 4096, "Q4_K"),
        ("q4_k_m", place("ffn_down", 6), 4096, "Q6_K"),
        ("q4_k_m", place("attn_v", 28), 4096, "Q6_K"),
        ("q4_k_m", place("output"), 4096, "Q6_K"),
        ("q4_k_m", place("token_embd"), 4096, "Q4_K"),
        ("q4_k_m", place("token_embd", tied=True), 4096, "Q6_K"),
        ("q4_k_m", place("token_embd", tied=True), 576, "Q8_0"),
        ("q4_k_m", place("attn_q"), 576, "Q5_0"),
        ("q4_k_m", place("attn_v"), 576, "Q8_0"),
        ("q4_k_m", place("attn_q"), 72, "F16"),
        ("q4_k_m", place("attn_v", 20, layers=80, shared=8), 8192, "Q5_K"),
        ("q4_k_s", place("attn_v", 3), 4096, "Q5_K"),
        ("q4_k_s", place("ffn_down", 4), 4096, "Q4_K"),
        ("q5_k_m", place("attn_v", 5), 4096, "Q5_K"),
        ("q3_k_m", place("attn_v", 1), 4096, "Q5_K"),
        ("q3_k_m", place("ffn_down", 2), 4096, "Q4_K"),
        ("q3_k_m", place("attn_output", 9), 4096, "Q4_K"),
        ("q3_k_l", place("ffn_down", 9), 4096, "Q5_K"),
        ("q6_k", place("attn_k"), 4096, "Q6_K"),
        ("iq4_xs", place("attn_v", 9), 4096, "Q5_K"),
        ("iq4_xs", place("attn_v", 9, shared=1), 4096, "IQ4_XS"),
        ("iq4_xs", place("attn_q"), 576, "IQ4_NL"),
        ("q4_0", place("output"), 576, "Q8_0"),
    ],
)  # fmt: skip
def test_a_matrix_has_the_type_that_llama_quantize_gives_it(kind: str, where: Place, columns: int, wanted: str) -> None:
    assert mixed_type(kind, where, columns).name == wanted


def test_every_type_of_the_flag_can_be_written() -> None:
    assert set(get_args(GgufType)) == {*MIXTURES, "q4_1", "q8_0", "f16"}


def test_files_of_every_mixture_are_read_by_llama_cpp(tmp_path: Path) -> None:
    """What it computes is what transformers does with the weights that the file holds."""
    model = model_of("qwen2", **WIDE)
    config, tensors = config_of(model), tensors_of(model)
    tokenizer = saved(tiny_tokenizer(), tmp_path / "tokenizer")
    kinds: list[Kind] = [kind for kind in get_args(GgufType) if kind in MIXTURES]
    files = {kind: tmp_path / f"{kind}.gguf" for kind in kinds}
    for kind, file in files.items():
        write_gguf(file, tensors, config=config, tokenizer=tokenizer, name="tiny", kind=kind)
        assert check_gguf(file, tensors, config=config, kind=kind) < 0.25
        assert fields(file)["general.file_type"] == int(MIXTURES[kind].file)
    readings = read(*(Asked(file, ids=IDS) for file in files.values()))
    for (kind, file), reading in zip(files.items(), readings, strict=True):
        assert float(divergence(reading.logprobs, held(model, file, tensors, kind)).max()) < 0.05, kind


def held(model: Any, file: Path, tensors: Any, kind: Any) -> Any:
    """The model with the weights that a file holds."""
    twin, config = copy.deepcopy(model), config_of(model)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    state = {
        stored.source: torch.from_numpy(
            gguf.quants.dequantize(found[stored.name].data, found[stored.name].tensor_type).copy()
        )
        for stored in stored_tensors(tensors, facts_of(config, name="tiny"), rope_of(config, name="tiny"), kind)
    }
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("kind", sorted(ROUNDED_BY_LLAMA_CPP), ids=lambda kind: str(kind.name))
def test_a_block_is_near_to_what_it_was_made_of(kind: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 512), dtype=np.float32)
    read_back = gguf.quants.dequantize(quantizer.quantize(rows, kind), kind)
    assert float(np.sqrt(((read_back - rows) ** 2).mean())) < (0.16 if kind == Type.Q3_K else 0.09)


def test_without_the_library_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(quantizer, "import_module", absent)
    quantizer.quantizer.cache_clear()
    with pytest.raises(MachineError, match=r"llama\.cpp's quantizer cannot be used") as caught:
        quantizer.quantizer()
    assert "qdist[llamacpp]" in caught.value.try_
