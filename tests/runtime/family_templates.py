"""Chat templates of thirteen families of models, small ones of their structure, and the special tokens they write."""

from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A template and its marks."""

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOLLM2 = (
    "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant."
    "<|im_end|>\n{% endif %}"
) + _CHATML
_LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (sys + '\n\n' if sys and loop.last else '') + m.content + "
    "'[/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_VICUNA = (
    "A chat between a curious user and an assistant. {% for m in messages %}{% if m.role == 'user' %}"
    "USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% else %}{% set text = m.content %}{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<|im_start|>assistant\n<think>\n{{ thought.strip('\n') }}"
    "\n</think>\n\n{{ text.lstrip('\n') }}{% else %}<|im_start|>assistant\n{{ text }}{% endif %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'system' %}"
    "{{ m.content }}{% else %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}<|Assistant|>{{ c }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
_QWEN3_THINKING = _QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
_HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_start|>", "<|im_end|>"), None, "<|endoftext|>"),
    "smollm2": Family(_SMOLLM2, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "llama2": Family(_LLAMA2, ("<s>", "</s>"), "<s>", "</s>"),
    "llama3": Family(
        _LLAMA3, ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "mistral": Family(_MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
    "gemma": Family(_GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi3": Family(_PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), None, "<|endoftext|>"),
    "vicuna": Family(_VICUNA, ("<s>", "</s>"), "<s>", "</s>"),
    "qwen3": Family(_QWEN3, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "r1": Family(_R1, ("<|begin|>", "<|User|>", "<|Assistant|>"), "<|begin|>", "<|end|>"),
    "qwen3-thinking": Family(_QWEN3_THINKING, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "harmony": Family(
        _HARMONY, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), None, "<|return|>"
    ),
    "glm4": Family(_GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"), None, "<|endoftext|>"),
}  # fmt: skip


def family_tokenizer(name: str, *, swallowing: bool = False) -> Any:
    """A byte-level BPE of common words that knows a family's special tokens, with its template.

    swallowing: special tokens take in the white space behind them, as Phi-3's do.
    """
    return tokenizer_of(FAMILIES[name], swallowing=swallowing)


def tokenizer_of(family: Family, *, swallowing: bool = False) -> Any:
    """The same for any family."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = dict.fromkeys((*family.specials, family.eos))
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(own, special=True, normalized=False, rstrip=swallowing) for own in specials],
        show_progress=False,
    )
    core.train_from_iterator(["What does the cat eat? A meal.\n\nASSISTANT: Think.\n\n"] * 8, trainer)
    return _finished(core, family)


def pieces_tokenizer(template: str) -> Any:
    """SentencePiece's way: a text begins with a space that is not there; '###' is a token with it and one without."""
    core = Tokenizer(
        models.BPE(
            vocab={
                piece: place
                for place, piece in enumerate(
                    ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "#", "##", "###", "\u2581###", "a",
                     "b", "\u2581b")
                )
            },
            merges=[("#", "#"), ("##", "#"), ("\u2581", "###"), ("\u2581", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    core.add_special_tokens(["<s>", "</s>"])
    return _finished(core, Family(template, ("<s>", "</s>"), "<s>", "</s>"))


def _finished(core: Tokenizer, family: Family) -> Any:
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=core, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = family.template
    return tokenizer
