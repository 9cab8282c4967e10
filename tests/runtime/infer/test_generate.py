"""Answers do not depend on their company, and prompts that cannot be read are named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.composed import request_of, sampled_request_of
from qdist.core.data.conversation import Conversation
from qdist.core.data.records import asked
from qdist.core.errors import DataError, ModelError, RunError, SpecError
from qdist.core.requests import Answering, Chat, Generate
from qdist.core.sampling import Sampling
from qdist.host.data.records import read_prompts
from qdist.host.evaluation.generation import run_generate
from qdist.host.run.rundir import RunDir
from qdist.runtime import tasks
from qdist.runtime.data.wording import encode_prompt, usual_wording
from qdist.runtime.infer import answering as answers
from qdist.runtime.infer import generate
from qdist.runtime.infer.answering import Keep, Work, answer_all
from qdist.runtime.infer.decoding import complete
from qdist.runtime.infer.generate import generate_file
from qdist.runtime.infer.kept import Answered, Closing
from qdist.runtime.infer.load import load
from qdist.runtime.infer.prompts import Speech, encode_prompts, speech_of
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.tiny import FAMILIES, adapted_run, dummy_job, real_job, save_config, save_data, save_model

PROMPTS = [[5, 9, 30], [200, 7, 7, 41, 99, 3, 12, 150, 31], [77], [8] * 20]


def answered(target: Any, prompts: Path, out: Path, *, copies: Any = None, **more: Any) -> Closing:
    """What `qdist generate` with these flags does."""
    given = {"run": str(target), "prompts": str(prompts), "out": str(out), **more}
    return generate_file(sampled_request_of(Generate, given), copies)


def with_pad(**options: Any) -> Any:
    tokenizer = tiny_tokenizer(**options)
    tokenizer.pad_token = "<|im_start|>"
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_answered_as_each_prompt_alone(tmp_path: Path, family: str) -> None:
    model, _ = load(save_model(tmp_path / "model", family))
    tokenizer = with_pad()
    together = complete(model, tokenizer, PROMPTS, max_new_tokens=12)
    alone = [complete(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_an_answer_ends_before_the_end_of_the_turn(tmp_path: Path) -> None:
    model, _ = load(save_model(tmp_path / "model"))
    tokenizer = with_pad()
    answer = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    model.generation_config.eos_token_id = [answer[4], 319]
    assert complete(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0] == answer[: answer.index(answer[4])]


def test_answers_and_beams_are_computed_in_the_dtype_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def noting(opens: Any) -> Any:
        def opened(*given: Any, **named: Any) -> Any:
            asked.append(named["dtype"])
            return opens(*given, **named)

        return opened

    for name in ("open_answerer", "open_model"):
        monkeypatch.setattr(answers, name, noting(getattr(answers, name)))
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    (tmp_path / "prompts.txt").write_text("hello\n")
    for beams in (1, 2):
        answered(
            model,
            tmp_path / "prompts.txt",
            tmp_path / f"{beams}.jsonl",
            beams=beams,
            dtype="bfloat16",
            max_new_tokens=4,
        )
    assert asked == ["bfloat16", "bfloat16"]


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return encode_prompt(asked({"messages": messages}, where=""), tokenizer, usual_wording(tokenizer))


def test_a_chat_is_encoded_by_its_template_up_to_the_assistants_turn() -> None:
    tokenizer = with_pad(template=CHATML, bos=False)
    text = tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "hello"}]))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_a_chat_is_encoded_as_it_would_be_trained_on() -> None:
    messages = [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"},
        {"role": "user", "content": "you"},
    ]  # fmt: skip
    tokenizer = with_pad(bos=False)
    text = tokenizer.decode(encode_chat(tokenizer, messages[:1]))
    assert text == "### Human: hello\n### Assistant:"
    text = tokenizer.decode(encode_chat(tokenizer, messages))
    assert text == f"### Human: hello\n### Assistant: there{tokenizer.eos_token}\n### Human: you\n### Assistant:"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "one\n\n two \n", ["one", " two "]),
        ("p.jsonl", '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n', ["one", "two"]),
        ("p.json", '[\n {"prompt": "one"},\n {"prompt": "two"}\n]\n', ["one", "two"]),
        ("p.jsonl", '\ufeff{"prompt": "q"}\n', ["q"]),
        ("p.txt", "\ufeffq\n", ["q"]),
        ("p.jsonl", '{"prompt": "one\u2028two"}\n', ["one\u2028two"]),
        ("p.txt", "one\u2028two\n", ["one\u2028two"]),
        ("p.csv", "prompt,kind\none,1\n", ["one"]),
    ],
)
def test_prompts_are_read_as_data_is(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [prompt.turns[-1].said for prompt in read_prompts(tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl:3:1: "),
        ("p.jsonl", '{"prompt": "a"}\n{"words": "b"}\n', r"p\.jsonl:2: neither 'prompt' nor 'messages'"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl:1: "),
        ("p.jsonl", "[1]\n", r"p\.jsonl, record 1: "),
        ("p.jsonl", '{"messages": []}\n', r"p\.jsonl:1: "),
        ("p.jsonl", '{"messages": ["hello"]}\n', r"p\.jsonl:1: "),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1, turn 1: "),
        ("p.txt", "\n\n", r"p\.txt holds no prompt"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name)


def test_prompts_that_are_no_utf_8_are_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("O\xf9 mange le chat ?\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8") as caught:
        read_prompts(tmp_path / "p.txt")
    assert "iconv" in caught.value.try_


def test_all_prompts_that_cannot_be_used_are_counted_and_three_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + '{"words": "b"}\n' * 5)
    with pytest.raises(DataError, match=r"5 of 6 prompts cannot be used\n(.*\n){3}  and 2 more"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_file_of_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*p\.txt"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(DataError, match=r"is a folder, not a file"):
        read_prompts(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("generate")
    model = save_model(folder / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    return adapted_run(real_job(model, save_data(folder / "d.jsonl"), folder / "run", seq_len=64))[0]


def test_a_file_is_answered_in_its_order_whatever_the_batch(
    run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("hello\nhello there system assistant user\na\n")
    answers = []
    for batch in (1, 2, 8):
        out = tmp_path / f"{batch}.jsonl"
        assert answered(run.path, prompts, out, max_new_tokens=6, batch=batch).answers == 3
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert [answer["messages"][0]["content"] for answer in answers[0]] == prompts.read_text().splitlines()
    said = capfd.readouterr().err
    assert said.count("backbone on the CPU; ") == 3
    assert "3 of 3 answered" in said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_target_that_is_there_is_refused_before_anything_else(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("mine\n")
    with pytest.raises(RunError, match=r"o\.jsonl exists"):
        answered(run.path, tmp_path / "absent.txt", tmp_path / "o.jsonl", max_new_tokens=1, batch=1)
    assert (tmp_path / "o.jsonl").read_text() == "mine\n"


def test_a_killed_command_goes_on_where_it_was(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, whole, out = tmp_path / "p.txt", tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    prompts.write_text("hello\nhello there system assistant user\na\nb\n")
    answered(run.path, prompts, whole, max_new_tokens=6, batch=2)
    came: list[int] = []

    def killed_after_two(work: Work, keep: Keep, opened: Callable[[str], None]) -> None:
        def kept(answers: dict[int, Answered]) -> None:
            keep(answers)
            came.extend(answers)
            if len(came) == 2:
                raise KeyboardInterrupt

        answer_all(work, kept, opened)

    monkeypatch.setattr(generate, "answer_all", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        answered(run.path, prompts, out, max_new_tokens=6, batch=2)
    assert not out.exists()
    assert answered(run.path, prompts, out, max_new_tokens=6, batch=2).answers == 4
    assert sorted(came) == [0, 1, 2, 3]
    assert "2 of 4 answers are there already" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()


def test_answers_to_other_prompts_are_not_taken_over(run: RunDir, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text("hello\n")
    (tmp_path / ".o.jsonl.unfinished").write_text('another command\n{"0": "WRONG"}\n')
    answered(run.path, prompts, out, max_new_tokens=2, batch=2)
    assert "WRONG" not in out.read_text()


def test_prompts_longer_than_the_models_positions_are_refused_and_longer_answers_cut(
    run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    speech = speech_of(str(run.path))
    assert speech.positions == 128
    (tmp_path / "p.txt").write_text("a" * 400 + "\nhello\n")
    with pytest.raises(DataError, match=r"p\.txt:1 has \d+ tokens, and the model has 128 positions"):
        answered(run.path, tmp_path / "p.txt", tmp_path / "o.jsonl", max_new_tokens=4, batch=1)
    (tmp_path / "p.txt").write_text("hello\n")
    answered(run.path, tmp_path / "p.txt", tmp_path / "o.jsonl", max_new_tokens=500, batch=1)
    assert "1 of 1 prompts leave fewer than 500 of the model's 128 positions" in capfd.readouterr().err


def test_a_template_that_refuses_a_prompt_is_told_with_its_place_before_weights_are_read(tmp_path: Path) -> None:
    refusing = tiny_tokenizer("{{ raise_exception('System role not supported') }}", bos=False)
    model = save_config(tmp_path / "model")
    refusing.save_pretrained(model)
    (tmp_path / "p.jsonl").write_text(
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}\n'
    )
    with pytest.raises(DataError, match=r"p\.jsonl:1: the tokenizer's chat template refuses it: System role not supp"):
        answered(model, tmp_path / "p.jsonl", tmp_path / "o.jsonl", max_new_tokens=1, batch=1)
    assert not (tmp_path / ".o.jsonl.unfinished").exists()


def test_prompts_without_positions_to_know_of_are_taken_as_they_are() -> None:
    speech = Speech(with_pad(bos=False), usual_wording(with_pad(bos=False)), None)
    prompt = Conversation(turns=asked({"prompt": "a" * 900}, where="p").turns, where="p")
    assert len(encode_prompts([prompt], speech)[0]) > 128


def test_a_chat_goes_through_standard_input(run: RunDir) -> None:
    """Turns, `/new`, an empty line; what the second conversation says is what the first said: it forgot."""
    done = subprocess.run(
        [sys.executable, "-m", "qdist", "chat", str(run.path), "--max-new-tokens", "5"],
        input="hello\n/new\nhello\n\nnever read\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("backbone on the CPU; an answer at a time")
    first, second = done.stdout.split("> ")[1], done.stdout.split("> ")[3]
    assert first.strip()
    assert first == second
    assert done.stdout.count("> ") == 4


def test_answers_to_records_are_those_to_their_prompts_and_stand_beside_the_references(
    run: RunDir, tmp_path: Path
) -> None:
    records = [
        {"instruction": "hello there", "input": "system", "output": "a user"},
        {"instruction": "user", "output": "hello"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
    ]
    data, prompts = tmp_path / "data.jsonl", tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked_alone = [*({**own, "output": None} for own in records[:2]), {"messages": records[2]["messages"][:1]}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in asked_alone))
    request = Generate(run=str(run.path), prompts=str(data), out="", sampling=Sampling(max_new_tokens=6))
    result = run_generate(request, answer=generate_file)
    answered(run.path, prompts, tmp_path / "o.jsonl", max_new_tokens=6)
    alone = [json.loads(line)["answer"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    (written,) = (run.path / "predictions").iterdir()
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == alone
    assert [line["reference"] for line in lines] == ["a user", "hello", "there"]
    assert written.name.startswith("data-adapter-")
    assert result.figures[0].count == 3


def test_words_with_a_slash_are_commands_and_are_told(run: RunDir) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qdist", "chat", str(run.path), "--max-new-tokens", "5"],
        input="/help\n/hlep\n/zzz\n/quit\nnever read\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    help_, mistyped, unknown = done.stdout.split("> ")[1:4]
    assert "/new              start over" in help_
    assert "Ctrl-C ends an answer" in help_
    assert mistyped == "no command /hlep; /help?\n"
    assert unknown.startswith("no command /zzz; ")
    assert done.stdout.count("> ") == 4


def answering(kind: type[Answering], target: Path, **more: str) -> Answering:
    files = {"prompts": "p.txt", "out": "o.jsonl"} if kind is Generate else {}
    return request_of(kind, {"run": str(target), **files, **more})


@pytest.mark.parametrize("kind", [Chat, Generate])
def test_a_tokenizer_is_looked_for_before_weights_are_read(
    tmp_path: Path, kind: type[Answering], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has no weights at all."""
    (tmp_path / "p.txt").write_text("hello\n")
    model = save_config(tmp_path / "mute")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        tasks.perform(answering(kind, model))
    assert str(caught.value) == (
        f"{model} has no tokenizer to read prompts with\n  try: put its tokenizer.json beside the weights"
    )


def test_a_run_over_random_weights_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    run = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run"))[0]
    with pytest.raises(RunError, match="was trained on random weights and has no tokenizer") as caught:
        answered(run.path, tmp_path / "p.txt", tmp_path / "o.jsonl", max_new_tokens=1, batch=1)
    assert caught.value.try_


@pytest.mark.parametrize("kind", [Chat, Generate])
def test_memory_for_gpus_is_refused_without_any(
    run: RunDir, tmp_path: Path, kind: type[Answering], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="max_memory is of GPUs to choose from; here is none"):
        tasks.perform(answering(kind, run.path, max_memory="99MiB"))
    assert not (tmp_path / "o.jsonl").exists()
