"""Answers do not depend on their company, and prompts that cannot be read are named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import DataError, RunError
from qdist.host.rundir import RunDir
from qdist.runtime.generate import complete, encode_chat, generate_file, main, read_prompts
from qdist.runtime.load import load
from tests.runtime.test_data import CHATML, tiny_tokenizer
from tests.runtime.tiny import FAMILIES, adapted_run, dummy_job, real_job, save_config, save_data, save_model

PROMPTS = [[5, 9, 30], [200, 7, 7, 41, 99, 3, 12, 150, 31], [77], [8] * 20]


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
    ],
)
def test_prompts_are_read_from_text_and_jsonl(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert [messages[-1]["content"] for messages in read_prompts(tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl:3: "),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', r"p\.jsonl:2: neither 'prompt' nor 'messages'"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl:1: "),
        ("p.jsonl", "[1]\n", r"p\.jsonl:1: "),
        ("p.jsonl", '{"messages": []}\n', r"p\.jsonl:1: "),
        ("p.jsonl", '{"messages": ["hello"]}\n', r"p\.jsonl:1: "),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1: "),
        ("p.txt", "\n\n", r"p\.txt holds no prompt"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name)


def test_a_missing_file_of_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*p\.txt"):
        read_prompts(tmp_path / "p.txt")


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
        assert generate_file(str(run.path), prompts, out, max_new_tokens=6, batch=batch) == 3
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert [answer["messages"][0]["content"] for answer in answers[0]] == prompts.read_text().splitlines()
    said = capfd.readouterr().err
    assert said.count("backbone on the CPU\n") == 3
    assert "3/3 answered" in said


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
    assert done.stderr.splitlines()[0] == "backbone on the CPU"
    first, second = done.stdout.split("> ")[1], done.stdout.split("> ")[3]
    assert first.strip()
    assert first == second
    assert done.stdout.count("> ") == 4


@pytest.mark.parametrize("arguments", [("chat",), ("file", "--prompts", "p.txt", "--out", "o.jsonl")])
def test_a_tokenizer_is_looked_for_before_weights_are_read(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder has no weights at all."""
    (tmp_path / "p.txt").write_text("hello\n")
    model = save_config(tmp_path / "mute")
    what, *options = arguments
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate", what, str(model), *options])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == (
        f"error: {model} has no tokenizer to read prompts with\n  try: put its tokenizer.json beside the weights\n"
    )


def test_a_run_over_random_weights_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    run = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run"))[0]
    with pytest.raises(RunError, match="was trained on random weights and has no tokenizer") as caught:
        generate_file(str(run.path), tmp_path / "p.txt", tmp_path / "o.jsonl", max_new_tokens=1, batch=1)
    assert caught.value.try_


@pytest.mark.parametrize("arguments", [("chat",), ("file", "--prompts", "p.txt", "--out", "o.jsonl")])
def test_memory_for_gpus_is_refused_without_any(
    run: RunDir, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "p.txt").write_text("hello\n")
    what, *options = arguments
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["generate", what, str(run.path), *options, "--max-memory-bytes", "99"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "error: max_memory is of GPUs to choose from; here is none" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
