"""How much of a reference is in a prediction? ROUGE and BLEU, as rouge-score and sacrebleu compute them.

Chinese, which neither library's usual tokenizer can divide, is cut into words by jieba for ROUGE, and by sacrebleu's
own tokenizer for BLEU. Whether a pair is in Chinese is told by its characters.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from qdist.core.errors import MachineError
from qdist.core.evaluation.results import Figure
from qdist.host.files import cache_dir

ROUGE = ("rougeL", "rouge1", "rouge2")
"""The first stands for the others."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_KANA = re.compile("[\u3041-\u30ff]")
_LEAST_HAN = 0.1
"""Share of a text's letters from which it is Chinese: an English text may quote a word."""
_DRAWS = 1000


class Pair(NamedTuple):
    """What should have been answered, and what was."""

    reference: str
    prediction: str

    @property
    def is_chinese(self) -> bool:
        """Whether the reference, or else the prediction, is written in Chinese."""
        return is_chinese(self.reference or self.prediction)


def is_chinese(text: str) -> bool:
    """Whether a text is, by its characters: Han, without the syllables that Japanese has between them."""
    letters = sum(map(str.isalpha, text))
    return bool(letters) and not _KANA.search(text) and len(_HAN.findall(text)) >= _LEAST_HAN * letters


def figures_of_each(pairs: Sequence[Pair]) -> list[dict[str, float]]:
    """ROUGE (F, 0 to 1) and BLEU (0 to 100, smoothed, of orders that a text is long enough for) of each pair alone.

    Raises MachineError where a library is missing.
    """
    with _needed():
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU(tokenize="none", effective_order=True)
        plain, chinese = RougeScorer(ROUGE), None
        found = []
        for pair in pairs:
            if pair.is_chinese:
                chinese = chinese or RougeScorer(ROUGE, tokenizer=_Jieba())
            scores = (chinese if chinese and pair.is_chinese else plain).score(pair.reference, pair.prediction)
            cut = _bleu_tokens(pair)
            own = {name: float(scores[name].fmeasure) for name in ROUGE}
            found.append(own | {"bleu": bleu.sentence_score(cut.prediction, [cut.reference]).score})
    return found


def corpus_bleu(pairs: Sequence[Pair]) -> Figure:
    """BLEU-4 of all pairs together, 0 to 100, with sacrebleu's bootstrap interval. Needs a pair."""
    with _needed():
        from sacrebleu.metrics.bleu import BLEU

        cut = list(map(_bleu_tokens, pairs))
        # Tokens are joined by spaces, which sacrebleu warns of unless it is told that they are meant.
        bleu, draws = BLEU(tokenize="none", force=True), _DRAWS if len(cut) > 1 else 1
        score = bleu.corpus_score([own.prediction for own in cut], [[own.reference for own in cut]], n_bootstrap=draws)
        # The interval is in what is printed alone.
        printed = json.loads(score.format(width=9, is_json=True, signature=str(bleu.get_signature())))
    middle, wide = printed.get("confidence_mean"), printed.get("confidence_var", 0.0)
    low, high = None, None
    if middle is not None:  # it is around the mean of the draws, which is not the score of all
        low, high = max(0.0, min(score.score, middle - wide)), max(score.score, middle + wide)
    return Figure(name="bleu", value=score.score, count=len(pairs), low=low, high=high)


def _bleu_tokens(pair: Pair) -> Pair:
    """A pair with spaces between its tokens."""
    tokenizer = _bleu_tokenizers()["zh" if pair.is_chinese else "13a"]
    return Pair(tokenizer(pair.reference.rstrip()), tokenizer(pair.prediction.rstrip()))


def _bleu_tokenizers() -> Mapping[str, Callable[[str], str]]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return {"13a": Tokenizer13a(), "zh": TokenizerZh()}


class _Jieba:
    """Cuts Chinese into words, as a tokenizer of rouge-score."""

    def __init__(self) -> None:
        import jieba

        jieba.setLogLevel(logging.WARNING)
        self._words = jieba.Tokenizer()
        self._words.tmp_dir = str(cache_dir("jieba"))  # by default a file in /tmp that any user may have put there

    def tokenize(self, text: str) -> list[str]:
        """Words in small letters, without punctuation."""
        return [word.lower() for word in self._words.cut(text) if any(map(str.isalnum, word))]


def unread_letters(pairs: Sequence[Pair]) -> int:
    """How many references ROUGE finds hardly a word in: its tokenizer knows a to z and 0 to 9 alone."""
    return sum(not pair.is_chinese and _is_foreign(pair.reference) for pair in pairs)


def _is_foreign(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(not letter.isascii() for letter in letters) > len(letters) / 2


@contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MachineError(f"ROUGE and BLEU need {error.name}", try_="pip install 'qdist[evaluate]'") from error
