"""A captured step is the same step: what only CUDA graphs can show."""

from typing import Any

import pytest
import torch

from qdist.runtime.infer.decoder import Decoder, why_not
from tests.runtime import every_model, tiny

PROMPTS = ([5, 9, 30], [200, 7, 7, 41, 99, 3, 12, 150, 31], [77], [8, 6] * 10, [3] * 70)
DENSE = ("llama", "gpt_neox", "gemma2", "gemma3_text", "qwen3")


def model_of(model_type: str, dtype: torch.dtype) -> Any:
    """A tiny model on the GPU that prefers some tokens clearly."""
    if model_type in tiny.FAMILIES:
        return tiny.tiny_model(model_type).to("cuda", dtype)
    model = every_model.tiny_model(model_type)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return model.to("cuda", dtype)


def written(model: Any, *, graphs: bool) -> list[list[int]]:
    """The tokens of each step of answers that join one after another; the first ends and the last takes its row."""
    decoder = Decoder(model, slots=6, positions=120, choose=lambda logits, _: logits.argmax(-1), graphs=graphs)
    if graphs:
        decoder.prepare()
    columns = []
    for step in range(30):
        if step < len(PROMPTS):
            decoder.prefill([PROMPTS[step]], [step])
        if step == 20:
            decoder.move(len(PROMPTS) - 1, 0)
        at_work = min(step + 1, len(PROMPTS) if step < 20 else len(PROMPTS) - 1)
        decoder.step(at_work)
        columns.append(decoder.tokens[:at_work].tolist())
    assert decoder.refused == ("" if graphs else "not asked for")
    return columns


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DENSE)
def test_tokens_are_the_same_with_a_graph_and_without(model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, dtype)
    assert why_not(model) == ""
    assert written(model, graphs=True) == written(model, graphs=False)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", [*DENSE, "gpt_oss", "deepseek_v3"])
def test_logits_of_steps_are_those_of_the_whole_text(model_type: str) -> None:
    model, logits = model_of(model_type, torch.float32), []

    def choose(given: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        logits.append(given[0].clone())
        return given.argmax(-1)

    decoder = Decoder(model, slots=1, positions=60, choose=choose, graphs=False)
    decoder.prefill([PROMPTS[3]], [0])
    text = list(PROMPTS[3])
    for _ in range(20):
        text.append(int(decoder.tokens[0]))
        decoder.step(1)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([text], device="cuda"), use_cache=False).logits[0, -21:].float()
    assert float((torch.stack(logits) - whole).abs().max()) < 1e-2 * float(whole.abs().max())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_waits_for_nothing() -> None:
    decoder = Decoder(
        model_of("llama", torch.bfloat16), slots=4, positions=60, choose=lambda logits, _: logits.argmax(-1)
    )
    decoder.prepare()
    decoder.prefill(PROMPTS[:3], [0, 1, 2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step(3)
        decoder.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
