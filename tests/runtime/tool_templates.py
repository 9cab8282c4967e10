"""Chat templates of fifteen families of models with tools, reasoning and `{% generation %}`: small, of their structure.

'[[' and ']]' stand around what a model writes: for `{% generation %}` in one form of each template, for nothing in the
other. Jinja drops a line's end behind a block, so that is written as an expression there.
"""

from typing import Any

from tests.runtime.family_templates import Family, tokenizer_of

_ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content ~ '\n' if messages[0].role == 'system' }}<tools>\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_QWEN25 = (
    _CHATML_TOOLS
    + "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    + "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n[[{{ m.content }}" + _CALLS + "<|im_end|>]]{{ '\n' }}"
    + "{% endif %}{% endfor %}" + _ASKED
)  # fmt: skip
_QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}" + _CHATML_TOOLS
    + "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    + "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n[["
    + "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content or '' }}\n"
    + "</think>\n\n{% endif %}{{ m.content }}" + _CALLS + "<|im_end|>]]{{ '\n' }}{% endif %}{% endfor %}" + _ASKED
)  # fmt: skip
_LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'user' %}<|start_header_id|>user<|end_header_id|>\n\n"
    "{% if tools and loop.index0 < 2 %}{% for t in tools %}{{ t | tojson }}\n\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}<|eot_id|>"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}{% endif %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n[[{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>]]"
    "{% elif m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "[[{{ m.content | trim }}<|eot_id|>]]"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    "{% set ns = namespace(sys='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.sys = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.sys }}{{ m.content | trim }} [/INST]{% set ns.sys = '' %}"
    "{% elif m.role == 'assistant' %}[[{{ ' ' + m.content | trim + ' ' + eos_token }}]]"
    "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=-1, sys='') %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}{% set ns.sys = m.content %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ ns.sys ~ '\n\n' if ns.sys and loop.last }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[[[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids of calls have nine letters') }}"
    "{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}]]"
    "{% elif m.role == 'assistant' %}[[{{ ' ' + m.content | trim + eos_token }}]]"
    '{% elif m.role == \'tool\' %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% endif %}{% endfor %}"
)
_GEMMA3 = (
    "{{ bos_token }}{% set ns = namespace(sys='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.sys = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}<start_of_turn>user\n{{ ns.sys }}{{ m.content | trim }}<end_of_turn>\n"
    "{% set ns.sys = '' %}"
    "{% elif m.role == 'assistant' %}<start_of_turn>model\n[[{{ m.content | trim }}<end_of_turn>]]{{ '\n' }}"
    "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}{% if m.role == 'system' and tools %}<|system|>{{ m.content }}<|tool|>{{ tools | tojson }}"
    "<|/tool|><|end|>{% elif m.role == 'assistant' %}<|assistant|>[[{{ m.content }}<|end|>]]"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}{{ eos_token }}\n"
    "{% elif m.role == 'system' %}<|system|>\n{{ m.content }}{{ eos_token }}\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n[[{{ m.content }}{{ eos_token }}]]{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|Assistant|>[[{% for c in m.tool_calls %}<|call|>"
    "{{ c.type + '<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}<|/call|>{% endfor %}"
    "{{ eos_token }}]]"
    "{% elif m.role == 'assistant' %}<|Assistant|>[[{{ m.content.split('</think>')[-1] }}{{ eos_token }}]]"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}<|/output|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
_GLM45 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n<tools>{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}"
    "{{ '\n' }}</tools>{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}{% elif m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% elif m.role == 'assistant' %}<|assistant|>[[{{ '\n' }}"
    "<think>{{ m.reasoning_content if m.reasoning_content and loop.index0 > ns.last }}</think>"
    "{{ '\n' + m.content if m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
    "{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}]]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_HARMONY = (
    "{% if messages[0].role == 'system' or tools %}<|start|>developer<|message|>"
    "{{ messages[0].content if messages[0].role == 'system' }}"
    "{% for t in tools or [] %}type {{ t.function.name }} = (_: any) => any;{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}{% if m.thinking and m.content %}{{ raise_exception('one of them') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant[[<|channel|>analysis<|message|>{{ m.thinking }}<|end|>]]{% endif %}"
    "<|start|>assistant[[ to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>]]"
    "{% elif m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant[[<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>]]"
    "{% else %}<|start|>assistant[[<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}]]{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.tool to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_SMOLLM3 = (
    "<|im_start|>system\n{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{{ messages[0].content if messages[0].role == 'system' }}<|im_end|>\n{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}[[{{ '<|im_start|>assistant\n' }}"
    "{{ '<think>\n\n</think>\n' if not '<think>' in m.content }}"
    "{{ m.content }}{{ '<|im_end|>\n' }}]]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GRANITE = (
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start_of_role|>assistant<|end_of_role|>[[{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
    "<|end_of_text|>]]{{ '\n' }}{% else %}<|start_of_role|>"
    "{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>[["
    "{{ m.content }}{% if m.tool_calls %}<|START_ACTION|>[{% for c in m.tool_calls %}"
    '{"tool_name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}]<|END_ACTION|>"
    "{% endif %}<|END_OF_TURN_TOKEN|>]]{% elif m.role == 'tool' %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>"
    "<results>{{ m.content }}</results><|END_OF_TURN_TOKEN|>{% else %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|SYSTEM_TOKEN|>' }}{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
_OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    "[[{{ m.content }}{{ eos_token }}]]"
    "{{ '\n' if not loop.last }}{% elif m.role in ('system', 'user') %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_IM = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>")
TOOL_FAMILIES = {
    "qwen2.5": Family(_QWEN25, _IM, None, "<|im_end|>"),
    "qwen3": Family(_QWEN3, _IM, None, "<|im_end|>"),
    "llama3.1": Family(_LLAMA31, _HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama2": Family(_LLAMA2, ("<s>", "</s>"), "<s>", "</s>"),
    "mistral": Family(_MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), "<s>", "</s>"),
    "gemma3": Family(_GEMMA3, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi4": Family(_PHI4, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), None, "<|endoftext|>"),
    "zephyr": Family(_ZEPHYR, ("<s>", "</s>"), "<s>", "</s>"),
    "r1": Family(_R1, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|call|>", "<|/call|>"), "<|begin|>", "<|end|>"),
    "glm4.5": Family(
        _GLM45, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"), None,
        "<|endoftext|>",
    ),
    "harmony": Family(
        _HARMONY, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"), None, "<|return|>"
    ),
    "smollm3": Family(_SMOLLM3, _IM, None, "<|im_end|>"),
    "granite": Family(
        _GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"), None, "<|end_of_text|>"
    ),
    "command-r": Family(_COMMAND_R, ("<BOS>", *_TURNS), "<BOS>", "<|END_OF_TURN_TOKEN|>"),
    "olmo": Family(_OLMO, ("<|user|>", "<|assistant|>"), "<|endoftext|>", "<|endoftext|>"),
}  # fmt: skip


def tool_tokenizer(name: str, *, marked: bool = False) -> Any:
    """The tokenizer of a family. marked: with `{% generation %}` around what a model writes."""
    family = TOOL_FAMILIES[name]
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    # Mistral's '[[[TOOL_CALLS]' begins with what stands for the block.
    template = family.template.replace("[[", begin).replace("]]", end)
    return tokenizer_of(family._replace(template=template))
