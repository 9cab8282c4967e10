"""A folder in which the README's commands work: tiny models and a little data, under the names that it uses.

A folder in the working directory wins over an alias, so `llama-65b` is two narrow layers there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from readme_commands import QUESTIONS, RECIPE, RUN

from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.sparsebit_files import make, write_config
from tests.runtime.tiny import save_model

SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
"""Groups of 128 and of 32 divide every linear's inputs."""
TALKS = "timdettmers/openassistant-guanaco"


def furnish(here: Path) -> None:
    """Write models, data, prompts and a recipe. here: an empty folder."""
    for seed, name in enumerate(("llama-7b", "llama-65b", "smollm2-135m", "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct")):
        save_model(here / name, tokenizer=_tokenizer(), seed=seed, **SHAPE)
    torch.save(make(naming="meta", packing="int8").content, here / "llama-7b_4w_pack8.pth.tar")
    _tokenizer().save_pretrained(write_config(here / "LLaMA 7B"))
    orders = [(f"Say {n} in words, slowly, {n % 7} times", f"{'one two three ' * (n % 5)}and {n}") for n in range(350)]
    _write_lines(here / "my.jsonl", [{"instruction": order, "output": answer} for order, answer in orders])
    (here / "faq.csv").write_text("question,answer\n" + "".join(f'"{ask}",{answer}\n' for ask, answer in orders))
    (here / "questions.txt").write_text("Say 3 in words\n")
    (here / TALKS).mkdir(parents=True)
    talks = [f"### Human: {order}### Assistant: {answer}" for order, answer in orders]
    _write_lines(here / TALKS / "openassistant_best_replies_train.jsonl", [{"text": talk} for talk in talks])
    (here / QUESTIONS).write_text("Say 3 in words\nSay ü in words\n", encoding="utf-8")
    theirs = "base_model: llama-7b\nadapter: qlora\ndatasets: [{path: my.jsonl, type: alpaca}]\nwarmup_steps: 0\n"
    (here / "theirs.yml").write_text(theirs)
    recipe = f'model = "llama-7b"\ndata = "my.jsonl"\nrun = "{RUN}"\nseq_len = 256\n'
    (here / RECIPE).write_text(recipe, encoding="utf-8")


def _tokenizer() -> Any:
    """One that has a pad, which stages cannot add."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = "<s>"
    return tokenizer


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
