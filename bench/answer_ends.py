"""Does every way to use a model stop where the answer ends? `python bench/answer_ends.py WORK [--steps 24]`.

Two models: SmolLM2-135M-Instruct as it is, and the same weights as a base model has them, with a ChatML template and
<|endoftext|> as eos in tokenizer and configuration. Each learns short answers; then prompts are answered by `qdist
generate` over the run, over the merged model, by plain transformers over the merged model with nothing but its own
generation_config.json, and by llama.cpp over the GGUF file where the package xllamacpp is there. An answer counts that
is the right one to the last character: what runs on into another turn is not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ANIMALS = ("cat", "dog", "fox", "owl", "hen", "cow", "pig", "bat")
MOST = 80


def record(number: int) -> tuple[str, str]:
    """A question and its answer."""
    animal = ANIMALS[number % len(ANIMALS)]
    return f"What does a {animal} eat on day {number}?", f"A {animal} eats meal number {number}."


def qdist(*words: str) -> None:
    """Run a command of qdist, shown."""
    print("$ qdist", *words, flush=True)
    subprocess.run([sys.executable, "-m", "qdist", *words], check=True)


def base_model(work: Path) -> Path:
    """SmolLM2 as Qwen2.5 base and its like are published: the template ends turns with what is not eos."""
    from qdist.host.sources.models import locate
    from qdist.runtime.quantize.materialize import materialize

    folder = work / "smol-base"
    shutil.copytree(materialize(locate("smollm2-135m")), folder, dirs_exist_ok=True)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text())
            for key, value in (("eos_token", "<|endoftext|>"), ("eos_token_id", 0), ("pad_token_id", 0)):
                if key in content:
                    content[key] = value
            path.write_text(json.dumps(content))
    return folder


def by_transformers(folder: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of plain transformers, with the folder's own settings alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=MOST, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def by_llama_cpp(file: Path, prompts: list[str]) -> list[str] | None:
    """llama.cpp's own server, through its own reading of the template and of the ends."""
    try:
        import xllamacpp
    except ImportError:
        return None
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.cpuparams.n_threads = 1024, 2
    server = xllamacpp.Server(params)
    answers = []
    for prompt in prompts:
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}], "max_tokens": MOST, "temperature": 0.0,
        }  # fmt: skip
        answers.append(server.handle_chat_completions(request)["choices"][0]["message"]["content"].strip())
    return answers


def of_file(path: Path) -> list[str]:
    """Answers that `qdist generate` wrote."""
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


def main() -> None:
    """Train both models, and print a row for each way to use each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    pairs = [record(number) for number in range(1, 161)]
    data = work / "data.jsonl"
    data.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
        for q, a in pairs
    ))  # fmt: skip
    asked = pairs[::16]
    prompts = work / "prompts.txt"
    prompts.write_text("".join(f"{question}\n" for question, _ in asked))
    rows = []
    for name, model in (("SmolLM2-Instruct", "smollm2-135m"), ("as a base model", str(base_model(work)))):
        folder = work / name.replace(" ", "-")
        run, merged, file = folder / "run", folder / "merged", folder / "model.gguf"
        if not (run / "result.json").is_file():
            qdist("launch", "--model", model, "--data", str(data), "--gpus", "1", "--run", str(run), "--set",
                  f"steps={given.steps}", "--set", "global_batch=16", "--set", "optim.lr=1e-3")  # fmt: skip
        if not merged.is_dir():
            qdist("merge", str(run), "--out", str(merged))
        if not file.is_file():
            qdist("export", str(run), "--to", "gguf", "--type", "f16", "--out", str(file))
        for what, target in (("run", run), ("merged", merged)):
            out = folder / f"{what}.jsonl"
            if not out.is_file():
                qdist(
                    "generate", str(target), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", str(MOST)
                )
            rows.append((name, f"qdist generate, {what}", of_file(out)))
        questions = [question for question, _ in asked]
        rows.append((name, "transformers, merged", by_transformers(merged, questions)))
        rows.append((name, "llama.cpp, GGUF f16", by_llama_cpp(file, questions)))
    print(f"\n{'model':18} {'by':24} answers that are right to the end, of {len(asked)}")
    for name, how, answers in rows:
        if answers is None:
            print(f"{name:18} {how:24} xllamacpp is not installed")
            continue
        right = sum(answer == expected for answer, (_, expected) in zip(answers, asked, strict=True))
        wrong = next((a for a, (_, e) in zip(answers, asked, strict=True) if a != e), "")
        print(f"{name:18} {how:24} {right}" + (f"   such as {wrong[:90]!r}" if wrong else ""))


if __name__ == "__main__":
    os.environ.setdefault("QDIST_CACHE", str(Path("answer-ends-cache").resolve()))
    main()
