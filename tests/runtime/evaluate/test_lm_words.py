"""The word lm:TASK opens a task of lm_eval, where it can be measured."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'qdist[lm-eval]'")

from qdist.core.errors import SpecError
from qdist.core.evaluation.words import TaskWord
from qdist.runtime.data.wording import usual_wording
from qdist.runtime.evaluate.lm_task import LmTask
from qdist.runtime.evaluate.tasks import Basis, open_task
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.evaluate.lm_bodies import CHOICES, GENERATED, write_task


def test_a_word_opens_a_task_of_as_many_documents_as_wanted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    word = TaskWord("lm", write_task(tmp_path, CHOICES))
    basis = Basis(longest=64)
    three, all_of_them = (open_task(word, tokenizer, usual_wording(tokenizer), limit=n, basis=basis) for n in (3, None))
    assert (three.name, len(three.items()), len(all_of_them.items())) == (str(word), 9, 21)


def test_texts_are_wanted_only_where_they_can_be_answered(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, bos=False)
    word, basis = TaskWord("lm", write_task(tmp_path, GENERATED)), Basis(longest=64, answers=True, chat=True)
    opened = open_task(word, tokenizer, usual_wording(tokenizer), basis=basis)
    assert isinstance(opened, LmTask)
    assert tokenizer.decode(opened.questions()[0].prompt).startswith("<|im_start|>user")
    with pytest.raises(SpecError, match="wants answers: they are not measured while a run trains"):
        open_task(word, tokenizer, usual_wording(tokenizer), basis=basis._replace(answers=False))
