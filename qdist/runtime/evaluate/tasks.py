"""Opens scored tasks: reads their files, and makes items of them."""

from pathlib import Path
from typing import Any, NamedTuple

from qdist.core.data.conversation import Wording
from qdist.core.data.reading import AS_FOUND, Reading, reading_of
from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError, SpecError
from qdist.core.evaluation.multiple_choice import SHOTS, exam_of
from qdist.core.evaluation.results import ScoredTask
from qdist.core.evaluation.windows import USUAL_WINDOW
from qdist.core.evaluation.words import KINDS, TaskWord
from qdist.core.spec.run_spec import RunSpec
from qdist.host.data.files import holds_records
from qdist.host.data.records import read_conversations
from qdist.host.evaluation.questions import read_questions
from qdist.host.opening import read_text
from qdist.runtime.data.batches import Samples
from qdist.runtime.data.tokenizing import SampleRules, tokenize
from qdist.runtime.evaluate.lm_task import LmTask
from qdist.runtime.evaluate.mmlu import Mmlu
from qdist.runtime.evaluate.perplexity import LogLikelihood, held_out, perplexity


class Basis(NamedTuple):
    """What tasks depend on beside their words."""

    longest: int = USUAL_WINDOW
    """Most tokens of an item."""
    window: int | None = None
    """Tokens of a window; None for the usual."""
    stride: int | None = None
    """Tokens between the starts of windows; None for the window."""
    seq_len: int = USUAL_WINDOW
    """Tokens of a sample, as in training."""
    train_on_source: bool = False
    reading: Reading = AS_FOUND
    """How records are read, as in training."""
    answers: bool = False
    """Whether tasks of lm_eval may want texts, beside probabilities."""
    chat: bool = False
    """Whether tasks of lm_eval are worded by the tokenizer's chat template."""
    samples: Samples | None = None
    """Those of the run, of which some are held out."""

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return min(self.window or USUAL_WINDOW, self.longest)


USUAL = Basis()


def basis_of(spec: RunSpec, *, longest: int) -> Basis:
    """What tasks depend on in a run. longest: most tokens of an item."""
    return Basis(
        longest=longest,
        seq_len=spec.seq_len,
        train_on_source=spec.train.train_on_source,
        reading=reading_of(spec.data, spec.format),
    )


def open_task(
    word: TaskWord, tokenizer: Any, wording: Wording, *, limit: int | None = None, basis: Basis = USUAL
) -> ScoredTask:
    """A task, ready to be scored.

    wording: how the run's conversations became text. limit: questions, samples or windows, from the first.
    Raises SpecError for a kind that is not scored, DataError for files that cannot be used.
    """
    name = str(word)
    if word.kind == "perplexity":
        width = basis.width
        texts = _texts(word.argument, basis.reading)
        return perplexity(name, texts, tokenizer, window=width, stride=basis.stride or width, limit=limit)
    if word.kind == "loss":
        return _held_out(word, tokenizer, limit, basis)
    if word.kind in ("mmlu", "mmlu5"):
        return _mmlu(word, tokenizer, limit, basis)
    if word.kind == "lm":
        task = LmTask(word.argument, tokenizer, longest=basis.longest, limit=limit, chat=basis.chat)
        if task.generates and not basis.answers:
            raise SpecError(
                f"{name} wants answers: they are not measured while a run trains, nor where no rank holds the whole "
                "model",
                try_="`qdist evaluate` with --placement replicate",
            )
        return task
    raise SpecError(f"{name} is not a task that is scored", try_=", ".join(KINDS.values()))


def _texts(source: str, reading: Reading) -> list[str]:
    """The whole of a text file; of records, the text of each."""
    path = Path(source).expanduser()
    if path.is_file() and not holds_records(path):
        return [read_text(path, DataError)]
    return ["".join(segment.text for segment in found.segments()) for found in _conversations(source, reading)]


def _conversations(source: str, reading: Reading) -> list[Any]:
    """The conversations of a source. Raises DataError, once, for all that cannot be used."""
    bad, kept = BadRecords(), []
    for found in read_conversations(source, reading=reading):
        if isinstance(found, DataError):
            bad.add(found)
        else:
            kept.append(found)
    bad.raise_any(len(kept) + bad.count)
    return kept


def _held_out(word: TaskWord, tokenizer: Any, limit: int | None, basis: Basis) -> LogLikelihood:
    name, longest = str(word), basis.longest
    if word.argument:
        found = read_conversations(word.argument, reading=basis.reading)
        length = min(basis.seq_len, longest)
        made = tokenize(found, tokenizer, SampleRules(seq_len=length, train_on_source=basis.train_on_source))
        return held_out(name, made, range(len(made)), longest=longest, limit=limit)
    if basis.samples is None or not basis.samples.held_out:
        raise SpecError("there are no held-out samples: these are of a run that held some out", try_="loss:FILE")
    return held_out(name, basis.samples.tokenized, basis.samples.held_out, longest=longest, limit=limit)


def _mmlu(word: TaskWord, tokenizer: Any, limit: int | None, basis: Basis) -> Mmlu:
    shots = SHOTS if word.kind == "mmlu5" else 0
    beside = Path(word.argument).expanduser().parent / "dev.jsonl"
    dev = read_questions(str(beside)) if shots and beside.is_file() else []
    exam = exam_of(read_questions(word.argument), dev, shots=shots)
    asked = exam.questions[:limit]
    fewer = len(asked) < len(exam.questions)
    notes = (f"the first {len(asked):,} of {len(exam.questions):,} questions",) if fewer else ()
    exam = exam._replace(questions=asked)
    return Mmlu(str(word), exam, tokenizer, longest=basis.longest, shots=shots, notes=notes)
