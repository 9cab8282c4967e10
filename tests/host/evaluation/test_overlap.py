"""Are ROUGE and BLEU the libraries' own numbers, and is Chinese cut into words?"""

from random import Random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from qdist.host.evaluation.overlap import ROUGE, Pair, corpus_bleu, figures_of_each, is_chinese, unread_letters

WORDS = ("the", "a", "cat", "dog", "runs,", "sits.", "don't", "quickly", "(in)", "3.5", "blue-green", "Tree's", "and")


def english(count: int) -> list[Pair]:
    """References with some of their words dropped, doubled or swapped for others."""
    random, pairs = Random(0), []
    for _ in range(count):
        reference = random.choices(WORDS, k=random.randint(3, 40))
        prediction = [random.choice((word, word, word, random.choice(WORDS))) for word in reference]
        pairs.append(Pair(" ".join(reference), " ".join(prediction[: random.randint(0, 45)])))
    return pairs


def test_a_hundred_pairs_have_the_libraries_own_numbers() -> None:
    pairs = english(100)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for pair, found in zip(pairs, figures_of_each(pairs), strict=True):
        expected = scorer.score(pair.reference, pair.prediction)
        assert {name: found[name] for name in ROUGE} == {name: expected[name].fmeasure for name in ROUGE}
        alone = BLEU(effective_order=True).sentence_score(pair.prediction, [pair.reference])
        assert found["bleu"] == alone.score
    whole = BLEU().corpus_score([pair.prediction for pair in pairs], [[pair.reference for pair in pairs]])
    found_bleu = corpus_bleu(pairs)
    assert found_bleu.value == whole.score
    assert found_bleu.low is not None
    assert found_bleu.high is not None
    assert found_bleu.low < whole.score < found_bleu.high


CHINESE = [
    Pair("我来到北京清华大学。", "我来到清华大学。"),
    Pair("今天天气很好,我们去公园散步吧!", "今天天气很好,我们去公园吧。"),
    Pair("机器学习模型 GPT-4 很大", "GPT-4 模型很大"),
]


def test_chinese_is_cut_by_jieba_for_rouge_and_by_sacrebleu_for_bleu() -> None:
    first, *_ = figures_of_each(CHINESE)
    # 我 来到 北京 清华大学 against 我 来到 清华大学: all 3 of 3 words, 3 of 4; pairs of words 1 of 2, 1 of 3.
    assert first["rouge1"] == pytest.approx(2 * 1.0 * 0.75 / 1.75)
    assert first["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert first["rougeL"] == first["rouge1"]
    hypotheses, references = [own.prediction for own in CHINESE], [own.reference for own in CHINESE]
    assert corpus_bleu(CHINESE).value == BLEU(tokenize="zh").corpus_score(hypotheses, [references]).score


def test_each_pair_is_cut_after_its_own_language() -> None:
    mixed = [*english(5), *CHINESE]
    assert figures_of_each(mixed) == [*figures_of_each(english(5)), *figures_of_each(CHINESE)]
    assert 0 < corpus_bleu(mixed).value < 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我来到北京", True), ("用 Python 写一个函数", True), ("The word 中 means middle, as every pupil knows", False),
        ("東京に行きました", False), ("plain", False), ("", False), ("123", False),
    ],
)  # fmt: skip
def test_chinese_is_told_by_its_characters(text: str, expected: bool) -> None:
    assert is_chinese(text) == expected


def test_an_empty_answer_has_nothing_of_the_reference() -> None:
    (found,) = figures_of_each([Pair("a cat", "")])
    assert found == {"rougeL": 0.0, "rouge1": 0.0, "rouge2": 0.0, "bleu": 0.0}
    assert corpus_bleu([Pair("a cat", "")]).value == 0.0


def test_a_single_pair_has_no_interval() -> None:
    assert corpus_bleu([Pair("a cat sits on the mat", "a cat sits on the mat")]).low is None


def test_letters_that_rouge_does_not_count_are_told() -> None:
    pairs = [Pair("Привет, как дела", ""), Pair("Grüße aus Köln", ""), *CHINESE]
    assert unread_letters(pairs) == 1
