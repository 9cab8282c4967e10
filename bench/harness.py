"""Tasks of lm-evaluation-harness over local files: SmolLM2 through qdist beside lm_eval's own hf backend, in float32.

python bench/harness.py [--data shared/data] [--limit 40]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qdist.host.sources.models import locate
from qdist.runtime.data.tokenizer import open_tokenizer
from qdist.runtime.engine.objective import unseen
from qdist.runtime.evaluate.lm_task import LmTask
from qdist.runtime.infer.answerer import Answerer, Ended, Piece, Question
from qdist.runtime.infer.ready import open_answerer
from qdist.runtime.model.skeleton import load_plain
from qdist.runtime.quantize.materialize import materialize
from tests.runtime.evaluate.local_scorer import LocalScorer

MODEL, LONGEST = "smollm2-135m", 2048
BODIES = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{input}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{output}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{input}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "generated": """
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: "{{output}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}, {metric: bleu, higher_is_better: true}]
""",
}


def main() -> None:
    """Print each figure from both sides, their difference, and the seconds that either took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("shared/data"))
    parser.add_argument("--limit", type=int, default=40)
    given = parser.parse_args()
    folder = materialize(locate(MODEL))
    tokenizer = open_tokenizer(folder, f"{MODEL} has no tokenizer")
    model = load_plain(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    model.eval()
    print(f"{'task':10} {'figure':16} {'qdist':>14} {'lm_eval hf':>14} {'difference':>11} {'s':>6} {'s':>6}")
    with tempfile.TemporaryDirectory() as work:
        for name, body in BODIES.items():
            file = Path(work, f"{name}.yaml")
            source = {"data_files": {"test": str((given.data / "mmlu_1000.jsonl").resolve())}, "cache_dir": work}
            head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n"
            file.write_text(head + body)
            ours, own_s = timed(lambda file=file: own(str(file), model, tokenizer, given.limit))
            theirs, their_s = timed(lambda file=file: reference(str(file), model, tokenizer, given.limit))
            for figure, value in ours.items():
                wanted = theirs[figure]
                line = f"{value:14.8f} {wanted:14.8f} {abs(value - wanted):11.1e} {own_s:6.1f} {their_s:6.1f}"
                print(f"{name:10} {figure:16} {line}", flush=True)


def timed(run: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float]:
    """Figures, and the seconds that they took."""
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def own(file: str, model: Any, tokenizer: Any, limit: int) -> dict[str, float]:
    """Figures by name, through qdist."""
    task = LmTask(file, tokenizer, longest=LONGEST, limit=limit)
    scored = LocalScorer(model, longest=LONGEST).score(task.items(), unseen)
    answers: list[list[int]] = []
    if task.generates:
        ready = open_answerer({"": MODEL}, slots=8, tokens=LONGEST, dtype="float32")
        answers = answers_of(ready.answerer, task.questions())
    return {figure.name: figure.value for figure in task.result(scored, answers).figures}


def answers_of(answerer: Answerer, questions: Sequence[Question]) -> list[list[int]]:
    """The new tokens of each answer."""
    tokens: list[list[int]] = [[] for _ in questions]
    for own, question in zip(tokens, questions, strict=True):

        def heard(told: Piece | Ended, own: list[int] = own) -> None:
            if isinstance(told, Piece):
                own.append(told.token)

        answerer.submit(question, heard)
    while answerer.step():
        pass
    return tokens


def reference(file: str, model: Any, tokenizer: Any, limit: int) -> dict[str, float]:
    """The same, through lm_eval alone."""
    # torch's own log_softmax on CPUs is 2e-6 off float64 in float32, more than anything else here.
    backend = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=LONGEST, batch_size=1, device="cpu", softmax_dtype="float64"
    )
    manager = TaskManager(include_defaults=False)
    found: Any = simple_evaluate(backend, tasks=[file], limit=limit, bootstrap_iters=0, task_manager=manager)
    ((_, figures),) = found["results"].items()
    return {key.partition(",")[0]: value for key, value in figures.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
