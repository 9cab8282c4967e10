"""The kernels that a model is said to run are those that its modules took."""

from types import MethodType
from typing import Any

import pytest
import torch

from qdist.core.spec.sections import Quant
from qdist.core.telemetry.kernels import Kernels, joined
from qdist.runtime.model.apart import keep_samples_apart
from qdist.runtime.model.packed import Packed4bit, set_compute
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.train.kernels import kernels_of
from tests.runtime.every_model import tiny_model


@pytest.mark.parametrize(
    ("model_type", "attention", "loss"),
    [
        ("llama", "sdpa", "of torch"),
        ("gpt_oss", "eager", "of torch"),
        ("mamba", "", "of torch"),
        ("modernbert-decoder", "sdpa", "of the class's own logits"),
    ],
)
def test_attention_and_loss_are_named(model_type: str, attention: str, loss: str) -> None:
    found = kernels_of(tiny_model(model_type), fused=False)
    assert (found.attention, found.loss) == (attention, loss)


@pytest.mark.parametrize(
    ("model_type", "functions", "package"),
    [
        ("qwen3_5_text", ("causal_conv1d_fn", "chunk_gated_delta_rule"), "fla"),
        ("kimi_linear", ("causal_conv1d_fn", "chunk_kda"), "fla"),
        ("mamba", ("causal_conv1d_fn", "selective_scan_fn"), "mamba_ssm"),
        ("nemotron_h", ("causal_conv1d_fn", "mamba_chunk_scan_combined"), "mamba_ssm"),
    ],
)
def test_recurrence_says_which_function_runs(model_type: str, functions: tuple[str, ...], package: str) -> None:
    words = kernels_of(tiny_model(model_type), fused=False).recurrence
    assert all(f"{function} of torch (slow, " in words for function in functions), words
    assert f"(slow, without {package})" in words
    assert "update" not in words


def test_attention_that_keeps_samples_apart_is_named_in_words() -> None:
    model = tiny_model("llama")
    keep_samples_apart(model)
    assert kernels_of(model, fused=False).attention == "of each sample by itself"


def test_a_model_without_recurrence_says_nothing_of_it() -> None:
    assert kernels_of(tiny_model("llama"), fused=True).words == (
        "attention sdpa",
        "loss fused",
        "norms of torch",
    )


def test_norms_that_liger_computes_are_counted() -> None:
    def forward(self: Any, hidden: Any) -> Any:
        return hidden

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    model = tiny_model("llama")
    norm = decoder_layers(model)[0].input_layernorm
    norm.forward = MethodType(forward, norm)
    assert kernels_of(model, fused=False).norms == "of Liger (1 of 8)"


def test_stages_name_the_kernels_of_all_of_them() -> None:
    first, last = Kernels(attention="sdpa", norms="of torch"), Kernels(attention="sdpa", loss="of torch")
    assert joined([first, last]).words == ("attention sdpa", "loss of torch", "norms of torch")


def test_products_in_fp8_are_named_and_counted_where_not_all_linears_have_them() -> None:
    layer: Any = decoder_layers(model := tiny_model("llama"))[0]
    shape: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16, "quant": Quant()}
    layer.one = Packed4bit(64, 32, **shape)
    set_compute(model, "fp8")
    assert kernels_of(model, fused=False).products == "in fp8"
    layer.other = Packed4bit(64, 24, **shape)
    assert kernels_of(model, fused=False).products == "in fp8 (1 of 2 linears)"
