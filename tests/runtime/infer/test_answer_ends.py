"""The token that ends an answer is found once, kept with the run, stopped at, and written wherever the model goes."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from qdist.core.errors import ModelError, RunError
from qdist.core.requests import Export
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports.gguf.export import run as to_gguf
from qdist.runtime.exports.merged_16bit import write
from qdist.runtime.exports.qalora_as_lora import widen
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.decoding import complete, text_of
from qdist.runtime.infer.load import load
from qdist.runtime.train.result import rehearse
from tests.runtime.data.test_tokenized import CHATML, HEADINGS, tiny_tokenizer
from tests.runtime.tiny import VOCAB, adapted_run, real_job, save_model

MESSAGES = [
    {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "system there"}]}
    for n in range(8)
]
TEXTS = [{"text": f"### Human: hello {n}### Assistant: there {n}### Human: you### Assistant: user"} for n in range(8)]


def save_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_over(folder: Path, records: list[dict[str, Any]], tokenizer: Any) -> RunDir:
    model = save_model(folder / "model", tokenizer=tokenizer)
    return adapted_run(real_job(model, save_records(folder / "d.jsonl", records), folder / "run", seq_len=64))[0]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A base model: its template ends turns with <|im_end|> (3), its eos is </s> (1)."""
    return run_over(tmp_path_factory.mktemp("chat"), MESSAGES, tiny_tokenizer(CHATML, bos=False))


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Raw text under headings, of a tokenizer that has a chat template all the same."""
    return run_over(tmp_path_factory.mktemp("text"), TEXTS, tiny_tokenizer(CHATML))


def forced(tokenizer: Any, text: str) -> Any:
    """What makes generation write a text."""
    script = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"prefix_allowed_tokens_fn": lambda _, ids: [script[min(len(ids) - 2, len(script) - 1)]]}


def test_a_run_knows_how_its_answers_end(chat: RunDir) -> None:
    job = chat.plan()
    assert (job.ends, str(job.wording)) == ((3,), "messages, chat template")
    assert GenerationConfig.from_pretrained(str(chat.adapter)).eos_token_id == [3, 1]


def test_an_answer_is_over_where_its_turn_is(chat: RunDir) -> None:
    model, tokenizer = load(chat.path)
    (answer,) = complete(model, tokenizer, [[5, 9]], max_new_tokens=20, **forced(tokenizer, "there<|im_end|>hello"))
    assert text_of(tokenizer, answer) == "there"


def test_an_answer_is_over_before_a_text_that_ends_it_in_every_row_of_a_batch(chat: RunDir) -> None:
    model, tokenizer = load(chat.path)
    force = forced(tokenizer, " hello there### Human: system user")
    answers = complete(model, tokenizer, [[5, 9], [9, 5]], max_new_tokens=40, end_text="### Human:", **force)
    assert [text_of(tokenizer, answer) for answer in answers] == ["hello there"] * 2


def test_an_answer_is_over_before_the_first_of_several_texts(chat: RunDir) -> None:
    model, tokenizer = load(chat.path)
    force = forced(tokenizer, " hello there system user")
    (answer,) = complete(
        model, tokenizer, [[5, 9]], max_new_tokens=40, end_text="user", stop=("system", "", "never"), **force
    )
    assert text_of(tokenizer, answer) == "hello there"


def test_spaces_before_points_stay_where_the_model_wrote_them() -> None:
    core = Tokenizer(models.WordLevel({"code": 0, ".": 1, "end": 2}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=core, clean_up_tokenization_spaces=True)
    assert (tokenizer.decode([0, 1, 2]), text_of(tokenizer, [0, 1, 2])) == ("code. end", "code . end")


def test_merged_models_and_gguf_files_end_where_the_run_did(chat: RunDir, tmp_path: Path) -> None:
    adapters = Adapters((chat,))
    write(adapters, tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    assert GenerationConfig.from_pretrained(str(tmp_path / "merged")).eos_token_id == [3, 1]
    to_gguf(Export(to="gguf", runs=(str(chat.path),), out=str(tmp_path / "m.gguf")))
    reader = GGUFReader(tmp_path / "m.gguf")
    ids = {what: int(reader.fields[f"tokenizer.ggml.{what}_token_id"].contents()) for what in ("eos", "eot", "padding")}
    assert ids == {"eos": 1, "eot": 3, "padding": 1}


def test_a_run_over_raw_text_is_prompted_as_it_was_trained(transcript: RunDir) -> None:
    plan = transcript.plan()
    assert str(plan.wording) == "text, raw text"
    _, tokenizer = load(transcript.path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<s>### Human: hi### Assistant:"
    assert (transcript.adapter / "chat_template.jinja").read_text().count("### Human:") == 1


def test_padding_is_no_row_of_the_vocabulary(tmp_path: Path) -> None:
    """Neither where there is none, nor where it lies behind the embedding: PEFT loads the adapter on the plain base."""
    behind = tiny_tokenizer(CHATML, bos=False)
    behind.add_special_tokens({"pad_token": "<pad>"})
    for name, tokenizer, rows in (
        ("none", tiny_tokenizer(CHATML, bos=False), VOCAB),
        ("behind", behind, len(behind) - 1),
    ):
        model = save_model(tmp_path / name / "model", tokenizer=tokenizer, vocab_size=rows)
        data = save_records(tmp_path / name / "d.jsonl", MESSAGES)
        run = adapted_run(real_job(model, data, tmp_path / name / "run", seq_len=64))[0]
        config = json.loads((run.adapter / "adapter_config.json").read_text())
        assert not config.get("trainable_token_indices")
        assert (run.plan().source.vocab_rows, run.plan().source.new_token_ids) == (None, ())
        base = AutoModelForCausalLM.from_pretrained(str(model))
        PeftModel.from_pretrained(base, str(run.adapter))
        write(Adapters((run,)), tmp_path / name / "merged", onto="dequantized", dtype=torch.bfloat16)
        assert json.loads((tmp_path / name / "merged" / "config.json").read_text())["vocab_size"] == rows
        to_gguf(Export(to="gguf", runs=(str(run.path),), out=str(tmp_path / name / "m.gguf")))


def test_trained_rows_are_told_where_plain_lora_is_asked_for(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    data = save_records(tmp_path / "d.jsonl", MESSAGES)
    run = adapted_run(real_job(model, data, tmp_path / "run", seq_len=64, new_tokens=("<call>",)))[0]
    with pytest.raises(
        RunError, match="has LoRA and 1 trained row of the vocabulary already; PEFT reads the rows, vLLM"
    ):
        widen(Adapters((run,)), tmp_path / "lora")


def named_templates(folder: Path, *names: str) -> None:
    """As `tokenizer_config.json` of older models has them."""
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": name, "template": CHATML} for name in names]
    path.write_text(json.dumps(config))


def test_named_templates_stay_with_the_adapter_and_the_merged_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    named_templates(model, "default", "tool_use")
    data = save_records(tmp_path / "d.jsonl", MESSAGES)
    run = adapted_run(real_job(model, data, tmp_path / "run", seq_len=64))[0]
    rehearse(run)
    write(Adapters((run,)), tmp_path / "merged", onto="dequantized", dtype=torch.bfloat16)
    for folder in (run.adapter, tmp_path / "merged"):
        assert (folder / "chat_template.jinja").is_file()
        assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert sorted(load(run.path)[1].chat_template) == ["default", "tool_use"]
    assert not list(run.path.glob(".adapter.*"))


def test_named_templates_without_a_default_are_refused_before_anything_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    named_templates(model, "chat", "rag")
    with pytest.raises(ModelError, match="chat templates called chat, rag, and none called default"):
        real_job(model, save_records(tmp_path / "d.jsonl", MESSAGES), tmp_path / "run", seq_len=64)
    assert not (tmp_path / "cache" / "packed").exists()


def test_what_is_gathered_at_the_end_is_tried_before_the_first_step(chat: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(chat.path, run.path)
    plan = run.plan()
    broken = tmp_path / "tokenizer"
    shutil.copytree(plan.source.tokenizer, broken)
    (broken / "tokenizer.json").unlink()
    source = msgspec.structs.replace(plan.source, tokenizer=str(broken))
    (run.path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, source=source)))
    with pytest.raises(ModelError, match="tokenizer has no tokenizer"):
        rehearse(run)


def test_an_end_of_white_space_is_told_and_answers_end_before_the_next_question(tmp_path: Path) -> None:
    run = run_over(tmp_path, MESSAGES, tiny_tokenizer(HEADINGS))
    wording = run.plan().wording
    assert wording is not None
    assert (wording.ends, wording.end_text) == ((1,), "user:")
