"""Which chat templates are known by name, for models without one of their own?

As their authors published them: of Stanford's Alpaca, LMSYS's Vicuna v1.1 and QLoRA's Guanaco; of the model cards of
Zephyr, Llama 2, Llama 3, Gemma, Mistral v0.3 and ChatML; of Linly, BiLLa, Ziya, AquilaChat, BELLE and Baichuan's chats.
"""

from typing import NamedTuple

from qdist.core.data.conversation import Style, template_of, written


class NamedTemplate(NamedTuple):
    """A chat template. In its text, `bos` and `end` are what begins a conversation and what ends a turn."""

    name: str
    text: str
    """Jinja."""
    end: str = ""
    """Marker that ends a turn; empty for the tokenizer's end-of-text token."""
    marks: tuple[str, ...] = ()
    """Other markers, which are tokens of the models that they were published with."""
    complete: bool = False
    """Whether the text is a user's own file, or begins and ends by itself: nothing is put before it."""


def jinja_of(template: NamedTemplate, *, opening: bool, end_is_token: bool) -> str:
    """The Jinja text of a template for one tokenizer.

    opening: whether the tokenizer begins texts with its begin-of-text token. end_is_token: whether the marker that ends
    a turn is a token; the end-of-text token takes its place where it is not.
    """
    if template.complete:
        return template.text
    begin = "bos_token" if opening else "''"
    end = f"'{template.end}'" if template.end and end_is_token else "eos_token"
    return f"{{% set bos = {begin} %}}{{% set end = {end} %}}{template.text}"


def _turns(question: str, answer: str, gap: str, *, system: str = "{}\n", usual: str = "") -> str:
    """A template whose questions end with the header of the answer. '{}' stands for what is said.

    gap: between an answer and the next question. usual: the system's message where there is none.
    """
    default = f"{{% if messages[0].role != 'system' %}}{written(usual)}{{% endif %}}" if usual else ""
    return (
        "{{ bos }}" + default + "{% for m in messages %}{% if m.role == 'system' %}" + _filled(system)
        + "{% elif m.role == 'user' %}{% if loop.index0 and messages[loop.index0 - 1].role == 'assistant' %}"
        + written(gap) + "{% endif %}" + _filled(question)
        + "{% elif m.role == 'assistant' %}" + _filled(answer) + "{{ end }}{% endif %}{% endfor %}"
    )  # fmt: skip


def _as_style(style: Style) -> str:
    return "{{ bos }}" + template_of(style, "\n", opening=False)


def _filled(pattern: str) -> str:
    before, _, after = pattern.partition("{}")
    return written(before) + "{{ m.content }}" + written(after)


def _headed(turn: str, asked: str, *, assistant: str = "assistant") -> str:
    """A template in which each turn has a header with its role. turn: '{}' stands for what is said, 'ROLE' for that."""
    before, _, after = turn.partition("{}")
    head, _, tail = before.partition("ROLE")
    role = "{{ 'ASSISTANT' if m.role == 'assistant' else m.role }}".replace("ASSISTANT", assistant)
    return (
        "{{ bos }}{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
        + written(head) + role + written(tail) + "{{ m.content }}" + after + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + written(asked) + "{% endif %}"
    )  # fmt: skip


def _system_in_question(system: str, question: str, answer: str, *, first: str = "", header: str = "") -> str:
    """A template that has the system's message within the first question, and begins each question anew.

    system, question, answer: '{}' stands for what is said. first: before the first turn. header: asks for an answer.
    """
    before, _, after = system.partition("{}")
    asks, _, asked = question.partition("{}")
    says, _, said = answer.partition("{}")
    return (
        first + "{% set own = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set own.system = " + _text(before) + " + m.content.strip() + " + _text(after) + " %}"
        "{% elif m.role == 'user' %}" + asks + "{{ own.system + m.content.strip() }}" + asked
        + "{% set own.system = '' %}{% elif m.role == 'assistant' %}" + says + "{{ m.content.strip() }}" + said
        + "{% endif %}{% endfor %}" + (f"{{% if add_generation_prompt %}}{header}{{% endif %}}" if header else "")
    )  # fmt: skip


def _text(text: str) -> str:
    """A text as a literal within an expression."""
    return written(text).removeprefix("{{ ").removesuffix(" }}") or "''"


_TOOLS = (
    "You may call functions to help with the question. Their signatures are within <tools></tools>:\n<tools>\n",
    "\n</tools>\n\nA call is a JSON object of name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>',
)
_CHATML = (
    "{{ bos }}{% set given = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools or messages[0].role == 'system' %}" + written("<|im_start|>system\n") + "{{ given }}"
    "{% if tools %}{% if given %}" + written("\n\n") + "{% endif %}" + written(_TOOLS[0])
    + "{% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}" + written("\n") + "{% endif %}{% endfor %}"
    + written(_TOOLS[1]) + "{% endif %}{{ end }}" + written("\n") + "{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + written("<|im_start|>tool\n<tool_response>\n")
    + "{{ m.content }}" + written("\n</tool_response>") + "{{ end }}" + written("\n")
    + "{% elif m.role != 'system' or not loop.first %}" + written("<|im_start|>") + "{{ m.role }}" + written("\n")
    + "{{ m.content }}{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}" + written("\n")
    + "{% endif %}" + written('<tool_call>\n{"name": ') + "{{ call.function.name | tojson }}"
    + written(', "arguments": ') + "{{ call.function.arguments | tojson }}" + written("}\n</tool_call>")
    + "{% endfor %}{{ end }}" + written("\n") + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + written("<|im_start|>assistant\n") + "{% endif %}"
)  # fmt: skip
"""ChatML; tools as Hermes and Qwen2.5 have them."""

_HELPFUL = "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the"
_ENDED = "{{ end }}" + written("\n")

TEMPLATES = {
    own.name: own
    for own in (
        NamedTemplate("alpaca", _as_style("alpaca")),
        NamedTemplate("guanaco", _as_style("headings")),
        NamedTemplate("plain", _as_style("plain")),
        NamedTemplate(
            "vicuna",
            _turns("USER: {} ASSISTANT:", " {}", "", system="{} ",
                   usual=f"A chat between a curious user and an {_HELPFUL} user's questions. "),
        ),
        NamedTemplate("chatml", _CHATML, end="<|im_end|>", marks=("<|im_start|>",)),
        NamedTemplate(
            "llama2",
            _system_in_question("<<SYS>>\n{}\n<</SYS>>\n\n",
                                "{{ bos }}" + written("[INST] ") + "{}" + written(" [/INST]"),
                                written(" ") + "{}" + written(" ") + "{{ end }}"),
        ),
        NamedTemplate(
            "llama3",
            _headed("<|start_header_id|>ROLE<|end_header_id|>\n\n{}{{ end }}",
                    "<|start_header_id|>assistant<|end_header_id|>\n\n"),
            end="<|eot_id|>", marks=("<|start_header_id|>", "<|end_header_id|>"),
        ),
        NamedTemplate(
            "gemma",
            _system_in_question("{}\n\n", written("<start_of_turn>user\n") + "{}" + _ENDED,
                                written("<start_of_turn>model\n") + "{}" + _ENDED,
                                first="{{ bos }}", header=written("<start_of_turn>model\n")),
            end="<end_of_turn>", marks=("<start_of_turn>",),
        ),
        NamedTemplate(
            "mistral",
            _system_in_question("{}\n\n", written("[INST] ") + "{}" + written("[/INST]"), written(" ") + "{}{{ end }}",
                                first="{{ bos }}"),
            marks=("[INST]", "[/INST]"),
        ),
        NamedTemplate("zephyr", _headed("<|ROLE|>\n{}" + _ENDED, "<|assistant|>\n")),
        NamedTemplate("linly", _turns("User: {}\nBot: ", "{}", "\n")),
        NamedTemplate("billa", _turns("Human: {}\nAssistant: ", "{}", "\n")),
        NamedTemplate("ziya", _turns("<human>:{}\n<bot>:", "{}", "\n")),
        NamedTemplate(
            "aquila",
            _turns("###Human: {}###Assistant:", " {}", "", system="{}",
                   usual=f"A chat between a curious human and an {_HELPFUL} human's questions."),
        ),
        NamedTemplate("belle", _turns("Human: {}\n\nAssistant:", "{}", "\n\n")),
        NamedTemplate("baichuan", _turns("<reserved_102>{}<reserved_103>", "{}", "", system="{}"),
                      marks=("<reserved_102>", "<reserved_103>")),
        NamedTemplate("baichuan2", _turns("<reserved_106>{}<reserved_107>", "{}", "", system="{}"),
                      marks=("<reserved_106>", "<reserved_107>")),
    )
}  # fmt: skip
"""By the names that `data.template` takes."""
