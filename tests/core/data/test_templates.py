"""Templates known by name write the prompts that their authors published: here they stand as text."""

from typing import Any

import pytest

from qdist.core.data.templates import TEMPLATES, jinja_of

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
AQUILA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TWICE = {
    "alpaca": f"{ALPACA}### Instruction:\nq\n\n### Response:a</s>\n\n### Instruction:\nr\n\n### Response:",
    "guanaco": "### Human: q\n### Assistant: a</s>\n### Human: r\n### Assistant:",
    "plain": "qa</s>r",
    "vicuna": f"{VICUNA}USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "chatml": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama2": "[INST] q [/INST] a </s>[INST] r [/INST]",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "a<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n<start_of_turn>user\nr"
    "<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "[INST] q[/INST] a</s>[INST] r[/INST]",
    "zephyr": "<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\n",
    "linly": "User: q\nBot: a</s>\nUser: r\nBot: ",
    "billa": "Human: q\nAssistant: a</s>\nHuman: r\nAssistant: ",
    "ziya": "<human>:q\n<bot>:a</s>\n<human>:r\n<bot>:",
    "aquila": f"{AQUILA}###Human: q###Assistant: a</s>###Human: r###Assistant:",
    "belle": "Human: q\n\nAssistant:a</s>\n\nHuman: r\n\nAssistant:",
    "baichuan": "<reserved_102>q<reserved_103>a</s><reserved_102>r<reserved_103>",
    "baichuan2": "<reserved_106>q<reserved_107>a</s><reserved_106>r<reserved_107>",
}
SYSTEM = {
    "alpaca": f"Be brief.\n\n{ALPACA}### Instruction:\nq\n\n### Response:",
    "guanaco": "Be brief.\n\n### Human: q\n### Assistant:",
    "plain": "Be brief.\n\nq",
    "vicuna": "Be brief. USER: q ASSISTANT:",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "[INST] Be brief.\n\nq[/INST]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nq</s>\n<|assistant|>\n",
    "linly": "Be brief.\nUser: q\nBot: ",
    "billa": "Be brief.\nHuman: q\nAssistant: ",
    "ziya": "Be brief.\n<human>:q\n<bot>:",
    "aquila": "Be brief.###Human: q###Assistant:",
    "belle": "Be brief.\nHuman: q\n\nAssistant:",
    "baichuan": "Be brief.<reserved_102>q<reserved_103>",
    "baichuan2": "Be brief.<reserved_106>q<reserved_107>",
}


def rendered(name: str, messages: list[dict[str, Any]], *, opening: bool = False, tools: Any = None) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    text: Any = render_jinja_template(
        [messages], chat_template=jinja_of(TEMPLATES[name], opening=opening, end_is_token=True), bos_token="<s>",
        eos_token="</s>", add_generation_prompt=True, tools=tools,
    )  # fmt: skip
    return str(text[0][0])


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, **beside: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **beside}


def test_every_template_is_held_against_its_text() -> None:
    assert set(TEMPLATES) == set(TWICE) == set(SYSTEM)


@pytest.mark.parametrize("name", TWICE)
def test_a_prompt_is_the_published_one(name: str) -> None:
    assert rendered(name, [u("q"), a("a"), u("r")]) == TWICE[name]
    assert rendered(name, [{"role": "system", "content": "Be brief."}, u("q")]) == SYSTEM[name]


@pytest.mark.parametrize("name", TWICE)
def test_a_conversation_begins_as_the_tokenizer_begins_texts(name: str) -> None:
    again = name == "llama2"  # which begins each question anew
    said = rendered(name, [u("q"), a("a"), u("r")], opening=True)
    assert said.replace("<s>", "", 2 if again else 1) == TWICE[name]
    assert said.startswith("<s>")


def test_a_marker_that_is_no_token_gives_way_to_the_end_of_the_text() -> None:
    assert "'<|im_end|>'" in jinja_of(TEMPLATES["chatml"], opening=False, end_is_token=True)
    assert "<|im_end|>" not in jinja_of(TEMPLATES["chatml"], opening=False, end_is_token=False)


def test_alpaca_has_the_input_of_an_instruction_apart() -> None:
    prompt = rendered("alpaca", [{**u("Add.\n\n1 2"), "instruction": "Add.", "input": "1 2"}])
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2"
        "\n\n### Response:"
    )


def test_chatml_writes_tools_calls_and_results() -> None:
    call = {"type": "function", "function": {"name": "feed", "arguments": {"n": 1, "who": "the <cat>"}}}
    tool = {"type": "function", "function": {"name": "feed", "parameters": {}}}
    messages = [u("q"), a("", tool_calls=[call, call]), {"role": "tool", "content": "ok"}, a("done")]
    text = rendered("chatml", messages, tools=[tool])
    head, _, rest = text.partition("<|im_start|>user\n")
    assert head.startswith("<|im_start|>system\nYou may call functions")
    assert '\n<tools>\n{"type": "function", "function": {"name": "feed", "parameters": {}}}\n</tools>\n' in head
    one = '<tool_call>\n{"name": "feed", "arguments": {"n": 1, "who": "the <cat>"}}\n</tool_call>'
    assert rest == (
        f"q<|im_end|>\n<|im_start|>assistant\n{one}\n{one}<|im_end|>\n<|im_start|>tool\n<tool_response>\nok\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n<|im_start|>assistant\n"
    )
    with_system = rendered("chatml", [{"role": "system", "content": "Be brief."}, u("q")], tools=[tool])
    assert with_system.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert with_system.count("<|im_start|>system") == 1
