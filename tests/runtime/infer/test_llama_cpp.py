from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp

from qdist.core.errors import DataError, ModelError
from qdist.core.requests import Export
from qdist.core.sampling import Sampling
from qdist.runtime.exports.gguf import export
from qdist.runtime.exports.gguf.file import write_gguf
from qdist.runtime.infer import llama_cpp
from qdist.runtime.infer.answerer import Ended, Piece, Question
from qdist.runtime.infer.decoding import complete
from qdist.runtime.infer.llama_cpp import LlamaCpp, choices_of, gguf_of, open_llama_cpp, start_server
from qdist.runtime.infer.text import Script
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.exports.gguf.test_tokenizer import saved
from tests.runtime.exports.test_export_targets import qlora_run
from tests.runtime.gguf_models import config_of, model_of, rounded, tensors_of

PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12], [40, 41])


def plain_model(tokenizer: Any) -> Any:
    """A model that writes whole characters alone, and never an end."""
    model = model_of("llama")
    odd = [token for token in range(320) if not tokenizer.decode([token]).strip("\N{REPLACEMENT CHARACTER}")]
    with torch.no_grad():
        model.lm_head.weight[[*odd, 0, 1, 2, 3, *range(len(tokenizer), 320)]] = 0
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("engine")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"
    model, out = plain_model(tokenizer), folder / "tiny.gguf"
    write_gguf(
        out,
        tensors_of(model),
        config=config_of(model),
        tokenizer=saved(tokenizer, folder / "t"),
        name="tiny",
        kind="f16",
    )
    return rounded(model, "f16"), tokenizer, out


def answerer(tiny: tuple[Any, Any, Path], *, slots: int = 2, positions: int = 64) -> LlamaCpp:
    _, tokenizer, file = tiny
    server = start_server(xllamacpp, file, slots=slots, positions=positions, threads=1)
    return LlamaCpp({"": server}, {"": Script(tokenizer)}, slots=slots, positions=positions)


def answers_to(own: LlamaCpp, *questions: Question) -> list[list[Piece | Ended]]:
    heard: list[list[Piece | Ended]] = [[] for _ in questions]
    for question, pieces in zip(questions, heard, strict=True):
        own.submit(question, pieces.append)
    while own.step():
        assert own.working <= own.slots
    return heard


def test_greedy_answers_are_transformers_own(tiny: tuple[Any, Any, Path]) -> None:
    """Three at a time in two slots."""
    model, tokenizer, _ = tiny
    sampling = Sampling(max_new_tokens=12, logprobs=2)
    heard = answers_to(answerer(tiny), *(Question(prompt, sampling) for prompt in PROMPTS))
    for prompt, (*pieces, ended) in zip(PROMPTS, heard, strict=True):
        (wanted,) = complete(model, tokenizer, [prompt], max_new_tokens=12)
        assert [piece.token for piece in pieces if isinstance(piece, Piece)] == wanted
        assert ended == Ended("length", "", len(prompt), 12)
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(wanted)
        assert all(isinstance(piece, Piece) and piece.likely[0].token == piece.token for piece in pieces)


def test_draws_are_a_function_of_the_seed(tiny: tuple[Any, Any, Path]) -> None:
    own = answerer(tiny)
    drawn = [Sampling(max_new_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = answers_to(own, *(Question(PROMPTS[0], sampling) for sampling in drawn))
    assert first == again != other


def test_an_answer_ends_before_a_stop_text_and_where_it_is_cancelled(tiny: tuple[Any, Any, Path]) -> None:
    own = answerer(tiny, slots=1)
    ((*pieces, _),) = answers_to(own, Question(PROMPTS[0], Sampling(max_new_tokens=12)))
    text = "".join(piece.text for piece in pieces)
    stop = text[5:8]
    ((*_, ended),) = said = answers_to(own, Question(PROMPTS[0], Sampling(max_new_tokens=12, stop=(stop,))))
    assert "".join(piece.text for piece in said[0]) == text.partition(stop)[0]
    assert isinstance(ended, Ended)
    assert ended.reason == "stop"
    heard: list[Piece | Ended] = []
    ticket = own.submit(Question(PROMPTS[0], Sampling(max_new_tokens=50)), heard.append)
    waiting: list[Piece | Ended] = []
    last = own.submit(Question(PROMPTS[1], Sampling(max_new_tokens=3)), waiting.append)
    while not heard:
        own.step()
    own.cancel(ticket)
    own.cancel(ticket)
    assert [type(each) for each in heard].count(Ended) == 1
    assert isinstance(heard[-1], Ended)
    assert heard[-1].reason == "cancelled"
    while own.step():
        pass
    assert len(waiting) == 4
    own.cancel(last)
    assert (own.working, own.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (Question([5], Sampling(presence_penalty=0.5)), "penalties for tokens of the prompt"),
        (Question(list(range(4, 70))), "66 tokens"),
        (Question([5], adapter="poet"), "no adapter called 'poet'"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(question: Question, said: str, tiny: tuple[Any, Any, Path]) -> None:
    with pytest.raises(DataError, match=said):
        answerer(tiny, slots=1).submit(question, lambda _: None)


def test_tokens_of_one_character_are_all_told() -> None:
    tokenizer = tiny_tokenizer()
    parrot = tokenizer.encode("\U0001f99c", add_special_tokens=False)
    assert len(parrot) == 4
    told = {"id": parrot[-1], "logprob": -0.5, "top_logprobs": []}
    piece = {"text": "\U0001f99c", "logprobs": {"content": [told]}, "finish_reason": None}
    assert [choice.token for choice in choices_of(piece, tokenizer)] == parrot
    nothing = {"text": "", "logprobs": None, "finish_reason": "stop"}
    assert choices_of(nothing, tokenizer) == []
    broken = {"text": "a", "logprobs": {"content": [{**told, "logprob": None}]}, "finish_reason": None}
    assert not choices_of(broken, tokenizer)[0].is_finite


def test_a_run_is_written_for_llama_cpp_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = qlora_run(tmp_path), list[Export]()

    def task(request: Export) -> None:
        asked.append(request)
        export.run(request)

    monkeypatch.setattr(llama_cpp, "run_task", task)
    ready = open_llama_cpp({"own": str(run.path)}, slots=1, tokens=32)
    assert gguf_of(str(run.path)).is_file()
    assert [(request.type, request.cached) for request in asked] == [("q8_0", True)]
    assert [path.name for path in gguf_of(str(run.path)).parent.glob("*Modelfile*")] == []
    assert ready.answerer.adapters == ("own",)
    heard: list[Piece | Ended] = []
    ready.answerer.submit(Question([5, 6], Sampling(max_new_tokens=3, ignore_end=True), "own"), heard.append)
    while ready.answerer.step():
        pass
    assert isinstance(heard[-1], Ended)
    with pytest.raises(DataError, match="merged into the model, not the base"):
        ready.answerer.submit(Question([5, 6]), heard.append)


def test_what_llama_cpp_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither a run nor a GGUF file"):
        gguf_of(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"llama\.cpp cannot read"):
        start_server(xllamacpp, broken, slots=1, positions=32, threads=1)
