"""How often is llama.cpp's likeliest token transformers' own, with every token of trained answers forced?

    python bench/gguf_agreement.py RECORDS [--answers 40] [--tokens 48] [--types f16,q8_0,...]

RECORDS: an Alpaca file such as alpaca_800.json. SmolLM2 is trained on the demo's data for 20 steps, its merged model
written as each type, and answers of RECORDS, after their questions, given token by token to llama.cpp and to the model
with its adapter in float32. Prints a line a type: places, agreement, and agreement where transformers' two likeliest
are more than 0.1 apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

USUAL = "f16,q8_0,q6_k,q5_k_m,q4_k_m,iq4_xs,q4_0,q3_k_m"
CLEAR = 0.1
"""Difference of logits from which on a likeliest token is not a tie."""


class Place(NamedTuple):
    """A place in an answer: what is before it, and what transformers would say."""

    before: tuple[int, ...]
    likeliest: int
    gap: float


def main() -> None:
    """Train, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--types", default=USUAL)
    parser.add_argument("--run", type=Path, help="a trained run, instead of training one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or trained(Path(folder) / "run")
        texts = [(record["instruction"], record["output"]) for record in json.loads(given.records.read_text())]
        places = list(answered(run, texts, answers=given.answers, tokens=given.tokens))
        print(f"{'type':8}{'places':>8}{'agree':>9}{'no tie':>9}", flush=True)
        for kind in given.types.split(","):
            print(row(kind, exported(run, Path(folder) / f"{kind}.gguf", kind), places), flush=True)


def qdist(*arguments: str) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "qdist", *arguments], check=True, stdout=subprocess.DEVNULL)


def trained(run: Path) -> Path:
    """SmolLM2 after 20 steps on the demo's data."""
    settings = ("--steps", "20", "--seq-len", "128", "--batch-size", "4")
    qdist("launch", "--model", "smollm2-135m", "--data", "demo", "--run", str(run), *settings)
    return run


def exported(run: Path, out: Path, kind: str) -> Path:
    """The merged model as a file of a type."""
    qdist("export", str(run), "--to", "gguf", "--out", str(out), "--type", kind)
    return out


def answered(run: Path, texts: Sequence[tuple[str, str]], *, answers: int, tokens: int) -> Iterator[Place]:
    """The places of the first answers, of up to so many tokens each."""
    import torch

    import qdist

    model, tokenizer = qdist.load(str(run), dtype="float32")
    for asked, said in texts[:answers]:
        turns = [{"role": "user", "content": asked}]
        head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ids = [*head, *tokenizer(said, add_special_tokens=False)["input_ids"][:tokens]]
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, len(head) - 1 : -1].float().topk(2)
        for count, (values, which) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            yield Place(tuple(ids[: len(head) + count]), which[0], values[0] - values[1])


def row(kind: str, file: Path, places: Sequence[Place]) -> str:
    """A type's line."""
    import xllamacpp

    from qdist.runtime.infer.llama_cpp import start_server

    server = start_server(xllamacpp, file, slots=1, positions=2048, threads=len(os.sched_getaffinity(0)))
    same = [likeliest(server, place.before) == place.likeliest for place in places]
    clear = [equal for equal, place in zip(same, places, strict=True) if place.gap > CLEAR]
    return f"{kind:8}{len(same):8,}{sum(same) / len(same):9.2%}{sum(clear) / len(clear):9.2%}"


def likeliest(server: Any, before: Sequence[int]) -> int:
    """llama.cpp's likeliest token. A full stop is taken whatever is likely: ends and half characters are not told."""
    told: list[dict[str, Any]] = []
    asked = {"prompt": list(before), "n_predict": 1, "n_probs": 1, "temperature": 0.0, "logit_bias": [[30, 1e6]]}
    server.handle_completions(asked, lambda piece: bool(told.append(piece)))
    (content,) = told[0]["choices"][0]["logprobs"]["content"]
    return int(content["top_logprobs"][0]["id"])


if __name__ == "__main__":
    main()
