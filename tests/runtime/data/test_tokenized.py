"""Conversations become tokens with the loss exactly where it belongs, once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qdist.core.data.conversation import Conversation
from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.data.records import conversations
from qdist.core.errors import DataError, ModelError, QdistError
from qdist.core.spec.sections import Data
from qdist.runtime.data.token_cache import cache_key, cached_tokenize, tokenizer_digest
from qdist.runtime.data.tokenized import IGNORED, TokenizedSet, learned_of_each, learned_tokens, load, save
from qdist.runtime.data.tokenizing import SampleRules, tokenize

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADINGS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content[:1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSING = "{{ raise_exception('System role not supported') }}"


def tiny_tokenizer(
    template: str | None = None, *, trim: bool = False, eos: str | None = "</s>", bos: bool = True
) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens; it puts <s> first when `bos`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(["assistant user system hello there Human Assistant"] * 4, trainer)
    shape = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.post_processor = shape if bos else processors.ByteLevel(trim_offsets=trim)
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def dialogue(*turns: tuple[str, str]) -> Conversation:
    messages = [{"role": role, "content": text} for role, text in turns]
    return conversations({"messages": messages}, where="d.jsonl:1")[0]


def pair(source: str, target: str) -> Conversation:
    return conversations({"input": source, "output": target}, where="d.jsonl:2")[0]


def encoded(*samples: Conversation, tokenizer: Any, seq_len: int = 512, train_on_source: bool = False) -> TokenizedSet:
    return tokenize(samples, tokenizer, SampleRules(seq_len=seq_len, train_on_source=train_on_source))


def learned_text(tokenized: TokenizedSet, tokenizer: Any) -> str:
    kept = tokenized.labels[tokenized.labels != IGNORED]
    return str(tokenizer.decode(kept.tolist(), clean_up_tokenization_spaces=False))


TALK = dialogue(
    ("system", "be"), ("user", "hello 🦜"), ("assistant", "  🦜 hi\n\n there\n"), ("user", "a"), ("assistant", "b")
)


@pytest.mark.parametrize("trim", [False, True])
def test_a_chat_learns_every_assistant_turn_and_its_end_and_nothing_else(trim: bool) -> None:
    tokenizer = tiny_tokenizer(CHATML, trim=trim, bos=False)
    tokenized = encoded(TALK, tokenizer=tokenizer)
    assert learned_text(tokenized, tokenizer) == "  🦜 hi\n\n there\n<|im_end|>b<|im_end|>"


def test_a_chat_is_tokenized_as_the_whole_rendering_is() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK.turns]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert encoded(TALK, tokenizer=tokenizer).tokens.tolist() == whole


def test_where_a_template_has_no_end_of_turn_token_the_line_end_and_the_end_of_text_are_learned() -> None:
    tokenizer = tiny_tokenizer(HEADINGS)
    tokenized = encoded(dialogue(("user", "a"), ("assistant", "b c")), tokenizer=tokenizer)
    assert learned_text(tokenized, tokenizer).lstrip() == "b c\n</s>"
    wording = tokenized.summary.wording
    assert wording is not None
    assert (wording.ends, wording.end_text) == ((tokenizer.eos_token_id,), "user:")
    assert "the chat template writes nothing behind an answer: </s> is learned there" in tokenized.summary.notes


def test_empty_answers_are_dropped_and_counted() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    empty, said = dialogue(("user", "a"), ("assistant", "")), dialogue(("user", "a"), ("assistant", "b"))
    tokenized = encoded(*[empty, said] * 12, tokenizer=tokenizer)
    assert (len(tokenized), tokenized.summary.dropped) == (12, 12)
    assert "12 of 24 records were dropped: the answer is empty" in tokenized.summary.notes
    with pytest.raises(DataError, match="all 2 records were dropped: the answer is empty"):
        encoded(empty, empty, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (FORGETFUL, "d.jsonl:1: the tokenizer's chat template asks for turn 3 by "),
        (REFUSING, "d.jsonl:1: the tokenizer's chat template refuses it: System role not supported"),
    ],
)
def test_a_template_that_hides_the_turns_is_refused(template: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        encoded(TALK, tokenizer=tiny_tokenizer(template))
    assert caught.value.message.startswith(said)


def test_a_template_that_rewrites_only_later_prompts_is_accepted() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    tokenized = encoded(dialogue(("user", "u"), ("assistant", "answer")), tokenizer=tokenizer)
    assert learned_text(tokenized, tokenizer) == "answer<|im_end|>"


@pytest.mark.parametrize("template", [None, CHATML])
def test_verbatim_text_never_meets_the_chat_template(template: str | None) -> None:
    tokenizer = tiny_tokenizer(template)
    tokenized = encoded(pair("### Human: a ### Assistant:", "b"), tokenizer=tokenizer)
    assert tokenizer.decode(tokenized.tokens.tolist()) == "<s>### Human: a ### Assistant:b</s>"
    assert learned_text(tokenized, tokenizer) == "b</s>"


def test_without_a_template_source_and_target_are_tokenized_apart() -> None:
    tokenizer = tiny_tokenizer()
    source, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hel", "lo"))
    tokenized = encoded(pair("hel", "lo"), tokenizer=tokenizer)
    assert tokenized.tokens.tolist() == [tokenizer.bos_token_id, *source, *target, tokenizer.eos_token_id]


def test_without_a_template_every_reply_is_learned_up_to_its_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenized = encoded(TALK, tokenizer=tokenizer)
    assert learned_text(tokenized, tokenizer) == "   🦜 hi\n\n there\n</s> b</s>"


def test_a_tokenizer_that_adds_no_opening_token_gets_none() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    assert tokenizer.decode(encoded(pair("a", "b"), tokenizer=tokenizer).tokens.tolist()) == "ab</s>"


def test_without_an_end_of_text_token_plain_text_is_refused() -> None:
    with pytest.raises(ModelError, match="no end-of-text token"):
        encoded(pair("a", "b"), tokenizer=tiny_tokenizer(eos=None))


@pytest.mark.parametrize("template", [None, CHATML])
def test_training_on_the_source_learns_every_token(template: str | None) -> None:
    tokenized = encoded(TALK, tokenizer=tiny_tokenizer(template), train_on_source=True)
    assert torch.equal(tokenized.labels, tokenized.tokens)
    assert tokenized.summary.learned_tokens == tokenized.summary.tokens - 1


def test_long_samples_are_cut_and_ones_with_nothing_to_learn_are_dropped_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    short, long_target, long_source = pair("a", "b"), pair("a", "b" * 9), pair("a" * 9, "b")
    tokenized = encoded(short, long_target, long_source, tokenizer=tokenizer, seq_len=6)
    summary = tokenized.summary
    assert (summary.records, summary.dropped, summary.truncated) == (3, 1, 2)
    assert (summary.tokens, summary.learned_tokens) == (4 + 6, 2 + 4)
    assert tokenized.offsets.tolist() == [0, 4, 10]


def document(text: str) -> Conversation:
    return conversations({"text": text}, where="d.jsonl:3")[0]


@pytest.mark.parametrize(
    ("text", "bos", "pieces"),
    [
        ("abcdefg", True, ["<s>abc", "<s>def", "<s>g</s>"]),
        ("abcdef", True, ["<s>abc", "<s>def", "<s></s>"]),
        ("abc", True, ["<s>abc", "<s></s>"]),
        ("ab", True, ["<s>ab</s>"]),
        ("abcdefg", False, ["abcd", "efg</s>"]),
        ("abcdefgh", False, ["abcd", "efgh", "h</s>"]),
        ("abc", False, ["abc</s>"]),
    ],
)
def test_a_document_longer_than_a_sample_is_cut_into_pieces(text: str, bos: bool, pieces: list[str]) -> None:
    tokenizer = tiny_tokenizer(CHATML, bos=bos)
    tokenized = encoded(document(text), tokenizer=tokenizer, seq_len=4)
    said = [tokenizer.decode(tokenized.tokens[tokenized.span(index)].tolist()) for index in range(len(tokenized))]
    assert said == pieces
    assert tokenized.summary.truncated == 0
    note = f"1 document became {len(pieces)} pieces of at most 4 tokens"
    assert (note in tokenized.summary.notes) == (len(pieces) > 1)
    learned = tokenizer.decode(tokenized.labels[tokenized.labels != IGNORED].tolist())
    assert learned.replace("hh", "h") == f"{text}</s>"


def test_a_transcript_is_cut_off_as_records_are() -> None:
    """A piece from the middle of it would begin with half an answer."""
    tokenizer = tiny_tokenizer()
    tokenized = encoded(document("### Human: abc### Assistant: de"), tokenizer=tokenizer, seq_len=8)
    assert (len(tokenized), tokenized.summary.truncated) == (1, 1)


@pytest.mark.parametrize(
    ("source", "target", "said", "notes"),
    [
        (3, 4, "<s>abefg</s>", ["1 of 1 records had their prompt cut at source_max_len=3, on the right: what asks for "
                                "the answer goes first"]),
        (None, 2, "<s>abcdef", ["1 of 1 records had their answer cut at target_max_len=2"]),
        (5, 4, "<s>abcdefg</s>", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("train_on_source", [False, True])
def test_prompts_and_answers_are_cut_at_lengths_of_their_own(
    source: int | None, target: int | None, said: str, notes: list[str], train_on_source: bool
) -> None:
    """As QLoRA's script does: the begin of text counts as the prompt's, the end of text as the answer's."""
    rules = SampleRules(seq_len=32, source_max_len=source, target_max_len=target, train_on_source=train_on_source)
    tokenizer = tiny_tokenizer()
    tokenized = tokenize([pair("abcd", "efg")], tokenizer, rules)
    assert tokenizer.decode(tokenized.tokens.tolist()) == said
    assert [note for note in tokenized.summary.notes if "max_len" in note] == notes
    if not train_on_source:
        assert learned_text(tokenized, tokenizer) == said[said.index("e") :]


def test_several_answers_have_no_lengths_of_their_own() -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:1 has 2 answers, and data\.source_max_len and data\.target_max_len"):
        tokenize([TALK], tiny_tokenizer(CHATML), SampleRules(seq_len=64, target_max_len=8))


def test_learned_tokens_are_counted_alike_with_and_without_the_counts_in_the_file() -> None:
    tokenizer = tiny_tokenizer()
    made = encoded(pair("a", "b"), TALK, document("abc"), pair("", "bb"), tokenizer=tokenizer)
    older = TokenizedSet(made.tokens, made.labels, made.offsets, made.summary)
    assert made.learned is not None
    assert learned_of_each(older).tolist() == learned_of_each(made).tolist() == made.learned.tolist()
    assert learned_tokens(older, (0, 2, 2)) == learned_tokens(made, (0, 2, 2))
    assert learned_tokens(made, ()) == learned_tokens(older, ()) == 0


def test_records_of_which_every_token_is_learned_are_counted_and_told() -> None:
    """One of them has no prompt, of the other the first token alone is given, which never has a loss."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenized = encoded(pair("", "bb"), pair("a", "b"), pair("aa", "b"), tokenizer=tokenizer)
    assert tokenized.summary.whole == 2
    assert "every token of 2 of 3 records has a loss: nothing in them is given" in tokenized.summary.notes
    learned = encoded(TALK, tokenizer=tokenizer, train_on_source=True).summary
    assert learned.whole == 1
    assert not any("every token of" in note for note in learned.notes)


def test_when_nothing_is_left_the_error_has_the_numbers() -> None:
    with pytest.raises(DataError) as caught:
        encoded(pair("a" * 9, "b"), pair("a" * 5, "b"), tokenizer=tiny_tokenizer(), seq_len=6)
    assert "all 2 records were dropped" in caught.value.message
    assert "seq_len=6; the longest prompt has 10 tokens" in caught.value.message


@pytest.mark.parametrize("trim", [False, True])
def test_white_space_that_ends_an_answer_is_learned_and_the_next_header_is_not(trim: bool) -> None:
    """Tokenizers that trim give a token of white space no characters."""
    tokenizer = tiny_tokenizer(HEADINGS, trim=trim, bos=False)
    talk = dialogue(("user", "a"), ("assistant", "b 🦜"), ("user", "c"), ("assistant", "d"))
    assert learned_text(encoded(talk, tokenizer=tokenizer), tokenizer) == "b 🦜\nd\n</s>"


def test_raw_text_that_ends_itself_and_its_line_is_ended_once() -> None:
    tokenizer = tiny_tokenizer()
    text = conversations({"text": "hello there</s>\n"}, where="d.jsonl:1")[0]
    tokenized = encoded(text, tokenizer=tokenizer)
    assert tokenizer.decode(tokenized.tokens.tolist()) == "<s>hello there</s>"
    assert "1 answer held the end of the turn already: it is written once" in tokenized.summary.notes


def test_an_answer_that_is_an_end_of_turn_alone_is_empty() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    said, ended = dialogue(("user", "a"), ("assistant", "b")), dialogue(("user", "a"), ("assistant", "<|im_end|>\n"))
    tokenized = encoded(said, ended, tokenizer=tokenizer)
    assert "1 of 2 records were dropped: the answer is empty" in tokenized.summary.notes
    assert learned_text(tokenized, tokenizer) == "b<|im_end|>"


USUAL: dict[str, Any] = {"reading": AS_FOUND, "seed": 0}


def source_file(tmp_path: Path, text: str = '{"input": "a", "output": "b"}\n') -> str:
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    return str(path)


def test_a_set_is_tokenized_once_and_mapped_afterwards(tmp_path: Path) -> None:
    source, tokenizer = Data(path=source_file(tmp_path)), tiny_tokenizer()
    options: dict[str, Any] = {**USUAL, "rules": SampleRules(seq_len=16), "folder": tmp_path / "cache"}
    first, path = cached_tokenize(source, tokenizer, **options)
    written = path.stat().st_mtime_ns
    second, again = cached_tokenize(source, tokenizer, **options)
    assert (again, again.stat().st_mtime_ns) == (path, written)
    assert all(torch.equal(one, two) for one, two in zip(first[:3], second[:3], strict=True))
    assert first.summary == second.summary
    assert [tensor.dtype for tensor in second[:3]] == [torch.int32, torch.int32, torch.int64]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_the_key_follows_all_that_decides_the_tokens(tmp_path: Path) -> None:
    source, plain = Data(path=source_file(tmp_path)), tiny_tokenizer()
    usual: dict[str, Any] = {**USUAL, "rules": SampleRules(seq_len=16)}
    keys = [
        cache_key(source, plain, **usual),
        cache_key(Data(path="demo"), plain, **usual),
        cache_key(source, tiny_tokenizer(CHATML), **usual),
        cache_key(source, tiny_tokenizer(eos="<|im_end|>"), **usual),
        *(
            cache_key(source, plain, **USUAL, rules=rules)
            for rules in (
                SampleRules(seq_len=17),
                SampleRules(seq_len=16, train_on_source=True),
                SampleRules(seq_len=16, source_max_len=8),
                SampleRules(seq_len=16, target_max_len=8),
            )
        ),
        cache_key(source, plain, **{**usual, "reading": Reading(format="oasst")}),
        cache_key(source, plain, **{**usual, "reading": Reading(roles={"user": "Q"})}),
        cache_key(Data(path=f"{source.path},{source.path}"), plain, **usual),
        cache_key(Data(path=f"{source.path}#1"), plain, **usual),
        cache_key(Data(path=f"{source.path}#1"), plain, **{**usual, "seed": 1}),
        cache_key(Data(path=source_file(tmp_path, '{"input": "a", "output": "c"}\n')), plain, **usual),
    ]
    assert len(set(keys)) == len(keys)


def test_the_tokenizer_digest_forgets_the_last_call() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer("a b c", truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(tiny_tokenizer())


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    save(encoded(pair("a", "b"), tokenizer=tiny_tokenizer()), path, key="right")
    with pytest.raises(DataError, match="holds key right, not wrong"):
        load(path, key="wrong")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="is damaged"):
        load(path, key="right")


def test_the_demo_loses_no_record(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenized, _ = cached_tokenize(
        Data(path="demo"), tokenizer, **USUAL, rules=SampleRules(seq_len=512), folder=tmp_path
    )
    assert (len(tokenized), tokenized.summary.dropped, tokenized.summary.truncated) == (640, 0, 0)


@pytest.mark.parametrize(
    ("name", "samples"),
    [("alpaca_800.json", 800), ("oasst_600.jsonl", 600), ("sharegpt_500.json", 500), ("self_instruct_252.jsonl", 252)],
)
@pytest.mark.parametrize("template", [None, CHATML])
def test_published_data_is_taken_without_loss(tmp_path: Path, name: str, samples: int, template: str | None) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is missing")
    options: dict[str, Any] = {**USUAL, "rules": SampleRules(seq_len=1 << 20), "folder": tmp_path}
    tokenized, _ = cached_tokenize(Data(path=str(SHARED / name)), tiny_tokenizer(template), **options)
    assert (len(tokenized), tokenized.summary.truncated) == (samples, 0)


def test_an_unknown_format_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    unknown = {**USUAL, "reading": Reading(format="alpacca")}
    with pytest.raises(QdistError, match="'alpacca' is not a record format"):
        cached_tokenize(Data(path="nowhere.jsonl"), None, **unknown, rules=SampleRules(seq_len=8), folder=tmp_path)


def written(tmp_path: Path, name: str, *pairs: str) -> str:
    """A file of pairs: 'ab' asks a and answers b, 'a' has an empty answer, '?' cannot be used."""
    lines = (f'{{"input": "{pair[0]}", "output": "{pair[1:]}"}}' if pair != "?" else '{"words": 1}' for pair in pairs)
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / name)


def test_samples_of_several_sources_lie_one_behind_another(tmp_path: Path) -> None:
    a, b, c = (written(tmp_path, *own) for own in (("a", "ab", "cd"), ("b", "ef", "gh", "ij"), ("c", "kl")))
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {**USUAL, "rules": SampleRules(seq_len=16), "folder": tmp_path / "cache"}
    whole, _ = cached_tokenize(Data(path=f"{a}:0.7,{b}#2:0.3", eval=c), tokenizer, **options)
    assert whole.summary.firsts == (0, 2, 4)
    assert len(whole) == 5
    assert learned_text(whole, tokenizer).startswith("b")
    alone, _ = cached_tokenize(Data(path=c), tokenizer, **options)
    assert torch.equal(whole.tokens[whole.span(4)], alone.tokens)


def test_weights_do_not_decide_the_tokens(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a", "ab"), written(tmp_path, "b", "cd")
    keys = [
        cache_key(Data(path=text), tiny_tokenizer(), **USUAL, rules=SampleRules(seq_len=16))
        for text in (f"{a},{b}", f"{a}:1,{b}:3")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (("?", "?"), "all 2 records cannot be used, and data.skip_bad left out every one: .*a:1: keys words"),
        (("a", "?"), r"all 2 records were dropped: the answer is empty \(1\), it cannot be used \(1\)"),
    ],
)
def test_where_nothing_is_left_the_records_that_were_left_out_are_a_reason(
    tmp_path: Path, texts: tuple[str, ...], why: str
) -> None:
    data = Data(path=written(tmp_path, "a", *texts), skip_bad=2)
    with pytest.raises(DataError, match=why):
        cached_tokenize(data, tiny_tokenizer(), **USUAL, rules=SampleRules(seq_len=16), folder=tmp_path / "cache")


def test_records_that_may_be_left_out_are_counted_and_named(tmp_path: Path) -> None:
    a = written(tmp_path, "a", "ab", "?", "cd", "?")
    options: dict[str, Any] = {**USUAL, "rules": SampleRules(seq_len=16), "folder": tmp_path / "cache"}
    found, _ = cached_tokenize(Data(path=a, skip_bad=2), tiny_tokenizer(), **options)
    assert (len(found), found.summary.bad, found.summary.records) == (2, 2, 4)
    assert found.summary.notes[0].startswith(f"2 of 4 records cannot be used and were left out: {a}:2: keys words")
    for allowed in (0, 1):  # though the set is in the cache
        with pytest.raises(DataError, match="2 of 4 records cannot be used"):
            cached_tokenize(Data(path=a, skip_bad=allowed), tiny_tokenizer(), **options)
