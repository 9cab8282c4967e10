from collections.abc import Callable

import pytest

from qdist.core.data.modelfile import GoTemplate, Messages, go_template, modelfile

TALK = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]


def chatml(messages: Messages, *, usual: str = "") -> str:
    turns = [("system", usual), *messages] if usual and messages[0][0] != "system" else messages
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def smollm(messages: Messages) -> str:
    return chatml(messages, usual="You help.")


def llama2(messages: Messages) -> str:
    text, system = "", ""
    for role, said in messages:
        if role == "system":
            system = f"<<SYS>>\n{said}\n<</SYS>>\n\n"
        elif role == "user":
            text, system = f"{text}<s>[INST] {system}{said} [/INST]", ""
        else:
            text += f" {said} </s>"
    return text


def llama3(messages: Messages) -> str:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    said = "".join(f"{header(role)}{text}<|eot_id|>" for role, text in messages)
    return f"<|begin_of_text|>{said}{header('assistant')}"


def gemma(messages: Messages) -> str:
    if messages[0][0] == "system":
        raise ValueError("System role not supported")
    names = {"user": "user", "assistant": "model"}
    said = "".join(f"<start_of_turn>{names[role]}\n{text}<end_of_turn>\n" for role, text in messages)
    return f"<bos>{said}<start_of_turn>model\n"


def headings(messages: Messages) -> str:
    """As `template_of` writes them."""
    text = ""
    for place, (role, said) in enumerate(messages):
        gap = "\n" if place else ""
        asked = f"{gap}### Human: {said}\n### Assistant:"
        text += {"system": f"{said}\n", "user": asked, "assistant": f" {said}</s>"}[role]
    return text


def of_today(messages: Messages) -> str:
    """Counts the turns, which no Go template of this form does."""
    return f"{len(messages)} turns: {chatml(messages)}"


TEMPLATES = {
    "chatml": (chatml, "", "<|im_end|>\n"),
    "a usual system message": (smollm, "", ""),
    "llama 2": (llama2, "<s>", " </s><s>"),
    "llama 3": (llama3, "<|begin_of_text|>", "<|eot_id|>"),
    "gemma": (gemma, "<bos>", "<end_of_turn>\n"),
    "headings": (headings, "", "</s>\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_written_as_one_of_ollama_s(name: str) -> None:
    write, opening, after_answer = TEMPLATES[name]
    found = go_template(write, opening=opening)
    assert found is not None
    assert found.after_answer == after_answer
    lead = " " if name in ("llama 2", "headings") else ""
    told = [(role, lead + text if role == "assistant" else text) for role, text in TALK]
    for start in (0, 1) if found.after_system else (1,):
        for end in (2, 4):
            assert found.write(told[start:end]) == write(TALK[start:end]).removeprefix(opening)


def test_the_texts_of_go_templates() -> None:
    assert str(go_template(chatml, opening="")) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}<|im_start|>user\n"
        "{{ end }}{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    )
    assert str(go_template(gemma, opening="<bos>")) == (
        "<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
    )
    assert str(GoTemplate("", "", "a {{b", "", "")) == 'a {{ "{{" }}b{{ .Prompt }}{{ .Response }}'


def refuses(_: Messages) -> str:
    raise ValueError("conversations must begin with a tool")


@pytest.mark.parametrize("write", [of_today, refuses, lambda messages: "hello"])
def test_other_templates_are_left_to_the_file(write: Callable[[Messages], str]) -> None:
    assert go_template(write, opening="") is None


def test_a_whole_modelfile() -> None:
    assert modelfile(
        "m.gguf", go_template(smollm, opening=""), system="", stops=("<|im_end|>", 'a "b"'), parameters={"top_p": 0.9}
    ).splitlines() == [
        "FROM ./m.gguf",
        'TEMPLATE """{{ if .System }}<|im_start|>system',
        "{{ .System }}<|im_end|>",
        "<|im_start|>user",
        "{{ else }}<|im_end|>",
        "<|im_start|>user",
        "{{ end }}{{ .Prompt }}<|im_end|>",
        "<|im_start|>assistant",
        '{{ .Response }}"""',
        'SYSTEM """You help."""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a \\"b\\""',
        "PARAMETER top_p 0.9",
    ]
    left = modelfile("m.gguf", None, system="Be brief.", stops=(), parameters={})
    assert left.splitlines()[1].startswith("# The chat template")
    assert left.splitlines()[2] == 'SYSTEM """Be brief."""'
