"""Tokenizers that came broken, and rows for tokens that had none."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qdist.runtime.data.tokenizer import add_rows, align_config, repair
from tests.runtime.tiny import VOCAB, tiny_config, tiny_model


def words(*tokens: str, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> Any:
    """A tokenizer that knows these words, in this order, and has these special tokens set."""
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)


LLAMA_1 = ("<unk>", "<s>", "</s>", "a", "b")
CHAT = ("<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a")


def test_llama_1_with_empty_bos_and_eos_gets_its_own_tokens_back() -> None:
    tokenizer = words(*LLAMA_1, bos="", eos="")
    repaired = repair(tokenizer, tiny_config(vocab_size=5, bos_token_id=0, eos_token_id=1))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.pad_token_id not in (None, 1, 2)
    assert repaired.new_ids == ()
    assert repaired.rows is None
    assert len(repaired.notes) == 3


def test_a_gguf_whose_eos_opens_a_turn_gets_the_configured_one() -> None:
    tokenizer = words(*CHAT, bos="<|im_start|>", eos="<|im_start|>", pad="<|endoftext|>")
    repaired = repair(tokenizer, tiny_config(vocab_size=5, eos_token_id=2))
    assert tokenizer.eos_token == "<|im_end|>"
    assert repaired.notes == ("eos was <|im_start|>: now <|im_end|>",)


def test_of_several_configured_ends_the_first_counts() -> None:
    tokenizer = words(*CHAT, bos="<|im_start|>", eos="<|im_start|>", pad="<|endoftext|>")
    repair(tokenizer, tiny_config(vocab_size=5, eos_token_id=[2, 3]))
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_whole_tokenizer_stays_as_it_is() -> None:
    tokenizer = words(*LLAMA_1, "<pad>", bos="<s>", eos="</s>", pad="<pad>")
    assert repair(tokenizer, tiny_config(vocab_size=6)) == ((), (), None)


@pytest.mark.parametrize(
    ("vocabulary", "pad", "new_ids"),
    [
        (("a", "<s>", "</s>", "<pad>"), "<pad>", ()),
        (("a", "<s>", "</s>", "<unk>", "<|endoftext|>"), "<|endoftext|>", ()),
        (("<unk>", "<s>", "</s>"), "<unk>", ()),
        (("a", "<s>", "</s>", "<|padding|>"), "<|padding|>", ()),
        (
            ("a", "<s>", "</s>", "<|reserved_special_token_7|>", "<|reserved_special_token_2|>"),
            "<|reserved_special_token_7|>",
            (),
        ),
        (("a", "<s>", "</s>", "[unused3]"), "[unused3]", ()),
        (("a", "<s>", "</s>"), "</s>", ()),
    ],
)
def test_a_pad_is_taken_from_the_vocabulary_and_never_added(
    vocabulary: tuple[str, ...], pad: str, new_ids: tuple[int, ...]
) -> None:
    tokenizer = words(*vocabulary, bos="<s>", eos="</s>")
    repaired = repair(tokenizer, tiny_config(vocab_size=len(vocabulary)))
    assert tokenizer.pad_token == pad
    assert repaired.new_ids == new_ids


def test_a_pad_behind_the_embedding_is_given_up_for_one_that_has_a_row() -> None:
    tokenizer = words("a", "<s>", "</s>", "<unk>", "<pad>", bos="<s>", eos="</s>", pad="<pad>")
    repaired = repair(tokenizer, tiny_config(vocab_size=4))
    assert tokenizer.pad_token == "<unk>"
    assert (repaired.new_ids, repaired.rows) == ((), None)
    assert repaired.notes == ("pad was <pad> (4), for which the model has no row: now <unk>",)


def test_new_tokens_behind_a_pad_without_a_row_leave_the_pad_untrained() -> None:
    tokenizer = words("a", "<s>", "</s>", "<unk>", "<pad>", bos="<s>", eos="</s>", pad="<pad>")
    repaired = repair(tokenizer, tiny_config(vocab_size=4), new_tokens=("<call>",))
    assert (repaired.new_ids, repaired.rows) == ((5,), 6)


def test_new_tokens_are_tokens_of_their_own_and_old_ones_are_not_new() -> None:
    tokenizer = words(*LLAMA_1, bos="<s>", eos="</s>", pad="<unk>")
    repaired = repair(tokenizer, tiny_config(vocab_size=5), new_tokens=("<call>", "a", "<return>"))
    assert repaired.new_ids == (5, 6)
    assert repaired.rows == 7
    assert tokenizer.convert_ids_to_tokens([5, 6]) == ["<call>", "<return>"]


def test_rows_that_the_embedding_has_to_spare_are_used() -> None:
    tokenizer = words("a", "<s>", "</s>", bos="<s>", eos="</s>")
    assert repair(tokenizer, tiny_config(vocab_size=64), new_tokens=("<call>",)).rows == 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("new_ids", "rows"), [((VOCAB, VOCAB + 1), VOCAB + 2), ((310, 311), VOCAB)])
def test_new_rows_are_the_mean_of_the_old_and_the_old_do_not_change(
    tied: bool, new_ids: tuple[int, ...], rows: int
) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    before = [model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()]
    add_rows(model, new_ids, rows)
    kept = [index for index in range(VOCAB) if index not in new_ids]
    for old, table in zip(before, (model.get_input_embeddings().weight, model.lm_head.weight), strict=True):
        assert table.shape[0] == rows
        assert torch.equal(table[kept], old[kept])
        for index in new_ids:
            assert torch.allclose(table[index], old[kept].mean(dim=0), atol=1e-7)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == rows


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "opt"])
def test_every_family_takes_new_rows(family: str) -> None:
    model = tiny_model(family)
    add_rows(model, (VOCAB,), VOCAB + 1)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.allclose(table.weight[VOCAB], table.weight[:VOCAB].mean(dim=0), atol=1e-7)


def test_no_new_rows_touch_nothing() -> None:
    model = tiny_model()
    before = model.get_input_embeddings().weight.detach().clone()
    add_rows(model, (), None)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(("ends", "aligned"), [(7, 2), ([7, 2], [7, 2]), ([7, 8], 2), (2, 2), (None, 2)])
def test_a_model_stops_and_pads_on_the_tokenizers_tokens(ends: Any, aligned: Any) -> None:
    tokenizer = words(*LLAMA_1, bos="<s>", eos="</s>", pad="<unk>")
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    align_config(model, tokenizer)
    for target in (model.config, model.generation_config):
        assert (target.pad_token_id, target.bos_token_id, target.eos_token_id) == (0, 1, aligned)


def test_the_ends_of_answers_are_stopped_at_beside_the_tokenizers_own() -> None:
    tokenizer = words(*LLAMA_1, bos="<s>", eos="</s>", pad="<unk>")
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    align_config(model, tokenizer, (4, 2))
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [4, 2]


def test_a_token_beyond_the_end_of_the_embedding_is_new() -> None:
    tokenizer = words(*LLAMA_1, bos="<s>", eos="</s>", pad="<unk>")
    repaired = repair(tokenizer, tiny_config(vocab_size=4))
    assert (repaired.new_ids, repaired.rows) == ((4,), 5)


def test_a_row_that_no_token_names_is_not_left_to_chance() -> None:
    model = tiny_model()
    add_rows(model, (VOCAB + 3,), VOCAB + 4)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.allclose(table[VOCAB:], table[:VOCAB].mean(dim=0), atol=1e-7)
