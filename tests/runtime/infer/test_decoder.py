"""Answers in rows of one cache have the tokens that transformers would give each alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map_only

from qdist.core.errors import DataError, SpecError
from qdist.core.model.families import from_config
from qdist.core.planning.inference import cache_bytes
from qdist.runtime.infer.attention import NAME
from qdist.runtime.infer.decoder import Decoder, why_not
from qdist.runtime.model.skeleton import offload
from tests.runtime import every_model, tiny

PROMPTS = ([5, 9, 30], [200, 7, 7, 41, 99, 3, 12, 150, 31], [77], [8, 6] * 10)
NEW = 10


def model_of(model_type: str) -> Any:
    """A tiny model that prefers some tokens clearly."""
    if model_type in tiny.FAMILIES:
        return tiny.tiny_model(model_type)
    model = every_model.tiny_model(model_type)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return model


def likeliest(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def expected(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """The tokens of transformers' own loop."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def answers(decoder: Decoder, prompts: Sequence[list[int]] = PROMPTS, new: int = NEW) -> list[list[int]]:
    """The tokens of prompts that are answered together."""
    decoder.prefill(prompts, range(len(prompts)))
    columns = [decoder.tokens[: len(prompts)].tolist()]
    for _ in range(new - 1):
        decoder.step(len(prompts))
        columns.append(decoder.tokens[: len(prompts)].tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def launched_anew() -> Callable[..., Any]:
    """In the place of a CUDA graph: what is captured is run at each replay."""

    def capture(passes: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        return lambda: passes(inputs), torch.empty(0)

    return capture


@pytest.mark.parametrize(
    "model_type",
    [
        *sorted(set(tiny.FAMILIES) - {"bloom"}), "deepseek_v3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss",
        "mixtral", "phi3", "qwen3",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_answers_that_join_and_move_have_the_tokens_of_each_alone(model_type: str) -> None:
    model = model_of(model_type)
    assert why_not(model) == ""
    wanted = [expected(model, prompt) for prompt in PROMPTS]
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest)
    decoder.prefill(PROMPTS[:2], [0, 1])
    answer_of_row, found = [0, 1], [[], [], [], []]
    for step in range(NEW):
        if step == 2:
            decoder.prefill(PROMPTS[2:], [2, 3])
            answer_of_row += [2, 3]
        if step == 6:  # the first one is cut off
            decoder.move(3, 0)
            answer_of_row = [3, 1, 2]
        for row, token in enumerate(decoder.tokens[: len(answer_of_row)].tolist()):
            found[answer_of_row[row]].append(token)
        decoder.step(len(answer_of_row))
    assert [own == whole[: len(own)] for own, whole in zip(found, wanted, strict=True)] == [True] * 4
    assert list(map(len, found)) == [6, 10, 8, 8]
    assert model.config._attn_implementation != NAME


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_prompts_padded_together_and_rows_that_hold_nothing_change_no_token(model_type: str) -> None:
    model = model_of(model_type)
    padded = Decoder(model, slots=6, positions=40, choose=likeliest, new_pool=launched_anew)
    padded.prepare()
    assert answers(padded, PROMPTS[:3]) == [expected(model, prompt) for prompt in PROMPTS[:3]]


def test_a_step_is_captured_the_second_time_that_so_many_rows_are_at_work() -> None:
    captured = []

    def pool() -> Any:
        def capture(passes: Any, inputs: Any) -> Any:
            captured.append(1)
            return lambda: passes(inputs), torch.empty(0)

        return capture

    decoder = Decoder(model_of("llama"), slots=6, positions=40, choose=likeliest, new_pool=pool)
    decoder.prefill(PROMPTS[:3], [0, 1, 2])
    counts = []
    for rows in (3, 3, 3, 1, 1, 4, 5, 6, 6):
        decoder.step(rows)
        counts.append(len(captured))
    assert counts == [0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_each_variant_of_choosing_is_captured_by_itself() -> None:
    captured, variant = [], ["greedy"]

    def pool() -> Any:
        return lambda passes, inputs: (captured.append(variant[0]) or (lambda: passes(inputs)), torch.empty(0))

    decoder = Decoder(
        model_of("llama"), slots=1, positions=40, choose=likeliest, new_pool=pool, variant=lambda: variant[0]
    )
    decoder.prefill([[5]], [0])
    for variant[0] in ("greedy", "greedy", "drawn", "greedy", "drawn"):
        decoder.step(1)
    assert captured == ["greedy", "drawn"]


def test_preparing_captures_every_number_of_rows() -> None:
    captured = []

    def pool() -> Any:
        return lambda passes, inputs: (captured.append(1) or (lambda: passes(inputs)), torch.empty(0))

    decoder = Decoder(model_of("llama"), slots=6, positions=40, choose=likeliest, new_pool=pool)
    decoder.prepare()
    assert len(captured) == 4  # 1, 2, 4, 6
    answers(decoder)
    assert len(captured) == 4


def test_where_a_step_cannot_be_captured_it_is_launched_and_says_why() -> None:
    def pool() -> Any:
        def capture(*_: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        return capture

    model = model_of("llama")
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest, new_pool=pool)
    assert answers(decoder) == [expected(model, prompt) for prompt in PROMPTS]
    assert decoder.refused == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), torch.OutOfMemoryError("none left")])
def test_a_variant_that_cannot_be_captured_is_launched_and_leaves_the_graphs_of_others(error: RuntimeError) -> None:
    captured, variant, pools = [], ["greedy"], []

    def pool() -> Any:
        pools.append(1)

        def capture(passes: Any, inputs: Any) -> Any:
            if variant[0] == "odd":
                raise error
            captured.append(variant[0])
            return lambda: passes(inputs), torch.empty(0)

        return capture

    model = model_of("llama")
    decoder = Decoder(model, slots=1, positions=40, choose=likeliest, new_pool=pool, variant=lambda: variant[0])
    decoder.prefill([PROMPTS[0]], [0])
    found = [decoder.tokens[0].item()]
    for variant[0] in ("greedy", "greedy", "odd", "odd", "odd", "drawn", "drawn", "greedy"):
        decoder.step(1)
        found.append(decoder.tokens[0].item())
    assert found == expected(model, PROMPTS[0], len(found))
    assert (captured, len(pools)) == (["greedy", "drawn"], 2)
    assert decoder.refused == ""
    assert list(decoder.refused_variants) == ["odd"]


def test_a_row_without_positions_left_harms_no_other() -> None:
    model = model_of("llama")
    decoder = Decoder(model, slots=2, positions=20, choose=likeliest)
    found = answers(decoder, [[5] * 18, [9, 9]], new=10)
    assert found[0][:3] == expected(model, [5] * 18, 3)
    assert found[1] == expected(model, [9, 9])
    assert decoder.lengths.tolist() == [20, 11]


def test_a_row_is_used_again_by_a_shorter_prompt() -> None:
    model = model_of("llama")
    decoder = Decoder(model, slots=1, positions=40, choose=likeliest)
    answers(decoder, [PROMPTS[3]])
    assert answers(decoder, [PROMPTS[0]]) == [expected(model, PROMPTS[0])]


def test_the_head_computes_one_token_of_each_prompt() -> None:
    model, widths = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: widths.append(tuple(output.shape[:2])))
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest, new_pool=launched_anew)
    decoder.prefill(PROMPTS, range(4))
    assert widths == [(4, 1)]


def test_each_token_is_assigned_to_its_row() -> None:
    told = []
    decoder = Decoder(
        model_of("llama"), slots=3, positions=40, choose=likeliest, assign=lambda rows: told.append(rows.tolist())
    )
    decoder.prefill([[4, 5], [6]], [2, 0])
    decoder.step(3)
    assert told == [[2, 2], [0], [0, 1, 2]]


def test_an_adapter_answers_with_the_model() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model_of("llama"), config).eval()
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest)
    found = answers(decoder)
    assert found == [expected(model, prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        base = answers(decoder)
        assert base == [expected(model, prompt) for prompt in PROMPTS]
    assert base != found


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_layers_on_other_devices_are_told_what_they_must_know(model_type: str) -> None:
    """Each layer gets copies of its inputs, as behind `fetch_to`."""
    model = model_of(model_type)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, given, named: tree_map_only(torch.Tensor, torch.clone, (given, named)), with_kwargs=True
        )
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest)
    assert answers(decoder) == [expected(model, prompt) for prompt in PROMPTS]


def test_offloaded_layers_answer_and_are_not_captured() -> None:
    model = model_of("llama")
    offload(model, [0])
    decoder = Decoder(model, slots=4, positions=40, choose=likeliest)
    assert decoder.refused == "layers are offloaded to host memory"
    assert answers(decoder) == [expected(model, prompt) for prompt in PROMPTS]


def test_a_prompt_without_a_position_for_an_answer_is_refused() -> None:
    decoder = Decoder(model_of("llama"), slots=1, positions=8, choose=likeliest)
    with pytest.raises(DataError, match="8 tokens, and there are 8 positions"):
        decoder.prefill([[3] * 8], [0])


def test_graphs_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match="there is no CUDA"):
        Decoder(model_of("llama"), slots=1, positions=8, choose=likeliest, graphs=True)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {}, "BloomForCausalLM takes no positions"),
        ("gptj", {}, "layer 0, GPTJBlock, computes its attention itself"),
        ("bert", {}, "BertSelfAttention makes a mask of its own"),
        ("qwen3_5_text", {}, "it has layers of linear_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its rotary frequencies depend on the longest row",
        ),
        ("falcon", {}, "its tokens do not see just those before them"),
        ("llama4_text", {}, "it has layers of chunked_attention"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_models_that_cannot_be_decoded_by_rows_say_why(model_type: str, changes: dict[str, Any], reason: str) -> None:
    assert why_not(every_model.tiny_model(model_type, **changes)) == reason


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32, "factor": 4.0}  # fmt: skip


def test_frequencies_of_long_texts_are_no_hindrance_to_short_ones() -> None:
    model = tiny.tiny_model("llama", rope_parameters=LONG)
    assert why_not(model) == why_not(model, positions=33) == "its rotary frequencies change after 32 tokens"
    assert why_not(model, positions=32) == ""
    decoder = Decoder(model, slots=4, positions=32, choose=likeliest)
    assert answers(decoder) == [expected(model, prompt) for prompt in PROMPTS]
    assert model.model.rotary_emb.rope_type == "longrope"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "mixtral"])
def test_the_cache_takes_the_bytes_that_a_plan_counts(model_type: str) -> None:
    model = model_of(model_type)
    decoder = Decoder(model, slots=3, positions=24, choose=likeliest)
    decoder.prefill([[5, 9]], [0])
    facts = from_config(model.config.to_dict(), name=model_type)
    counted = sum(run.count * cache_bytes(run.shape, 4, 3 * 24) for run in facts.layers)
    assert decoder.cache.size_bytes == counted
