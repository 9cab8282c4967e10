"""How fast does a model with its adapter answer on a CPU, at batch 1, and are its answers PEFT's?

Without arguments it trains three steps of SmolLM2-135M (NF4, r=64) on two lines first: python bench/answer_cpu.py
--run takes a run that is there; --prompts N of --data compares greedy answers of N prompts as well.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

import qdist
from qdist.core.sampling import Sampling
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.linears import prepare_linears
from qdist.runtime.infer.ready import open_answerer

PROMPT = "Tell me a long story about a lighthouse keeper who writes letters to the sea."


def trained(folder: str) -> str:
    """A run of three steps."""
    data, run = Path(folder, "data.json"), Path(folder, "run")
    data.write_text(json.dumps([{"instruction": f"Count to {n}.", "output": "one two three"} for n in (3, 4)]))
    settings = {"steps": 3, "seq_len": 64, "global_batch": 2}
    qdist.launch(model="smollm2-135m", data=str(data), run=str(run), **settings)
    return str(run)


def by_generate(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """transformers' own loop."""
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count
    )
    answer: list[int] = found[0, ids.shape[1] :].tolist()
    return answer


def by_steps(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """A greedy loop over a cache of fixed size, without anything that a token does not need."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = StaticCache(config=base.config, max_cache_len=ids.shape[1] + count)
    place, answer = torch.arange(ids.shape[1]), list[int]()
    while len(answer) < count:
        logits = base(input_ids=ids, position_ids=place[None], past_key_values=cache, logits_to_keep=1).logits
        ids, place = logits[:, -1].argmax(-1, keepdim=True), place[-1:] + 1
        answer.append(int(ids))
    return answer


def speed(answer: Callable[[Any, torch.Tensor, int], list[int]], model: Any, ids: torch.Tensor, count: int) -> float:
    """Tokens/s, the best of three: the machine may have other work."""
    answer(model, ids, 4)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        answer(model, ids, count)
        seconds.append(time.perf_counter() - begin)
    return count / min(seconds)


def answerer_speed(run: str, dtype: str, ids: torch.Tensor, count: int) -> float:
    """Tokens/s of what generate, chat and serve answer with, from the second token on, the best of three."""
    ready = open_answerer({"run": run}, slots=1, tokens=ids.shape[1] + count, dtype=dtype)
    asked = Question(ids[0].tolist(), Sampling(max_new_tokens=count, ignore_end=True), "run")
    found = []
    for _ in range(4):
        times = list[float]()
        ready.answerer.submit(asked, lambda _, times=times: times.append(time.perf_counter()))
        while ready.answerer.step():
            pass
        found.append((len(times) - 2) / (times[-2] - times[0]))
    return max(found[1:])


def encoded(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [1, tokens]."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


@torch.inference_mode()
def measure(run: str, dtype: str, threads: int, count: int, prompts: list[str]) -> None:
    """Print the speeds before and after, and how many answers stayed the same."""
    torch.set_num_threads(threads)
    model, tokenizer = qdist.load(run, dtype=dtype, device="cpu")
    ids = encoded(tokenizer, PROMPT)
    today = speed(by_generate, model, ids, count)
    loop = speed(by_steps, model, ids, count)
    wanted = [by_generate(model, encoded(tokenizer, prompt), count) for prompt in prompts]
    began = time.perf_counter()
    choice = prepare_linears(model)
    took = time.perf_counter() - began
    prepared = speed(by_steps, model, ids, count)
    found = [by_steps(model, encoded(tokenizer, prompt), count) for prompt in prompts]
    same = sum(one == other for one, other in zip(wanted, found, strict=True))
    choice.only("")
    bare = speed(by_steps, model, ids, count)
    print(f"{dtype}, {threads} threads, {count} tokens; {choice.note}; prepared in {took:.1f} s")
    print(f"{'generate over PEFT':32}{today:8.1f} tok/s")
    print(f"{'a loop over a static cache':32}{loop:8.1f} tok/s")
    print(f"{'the same, prepared linears':32}{prepared:8.1f} tok/s")
    print(f"{'the same, base alone':32}{bare:8.1f} tok/s")
    print(f"{'the answerer':32}{answerer_speed(run, dtype, ids, count):8.1f} tok/s")
    if prompts:
        print(f"{same} of {len(prompts)} greedy answers are PEFT's")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--data", default="")
    parser.add_argument("--prompts", type=int, default=0)
    asked = parser.parse_args()
    lines = Path(asked.data).read_text().splitlines()[: asked.prompts] if asked.data else []
    prompts = [json.loads(line)["text"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        measure(asked.run or trained(folder), asked.dtype, asked.threads, asked.tokens, prompts)


if __name__ == "__main__":
    main()
