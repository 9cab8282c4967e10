"""Does a model card say what a hub reads and a person asks, and nothing of the machine that it was written on?"""

from typing import Any

import msgspec
import pytest
import yaml

from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.core.planning.plan import DataFacts, Plan
from qdist.core.telemetry.card import Card, card_text, is_ours, license_of, without_folders
from qdist.core.telemetry.events import Event
from qdist.core.telemetry.history import RunHistory
from tests.core.telemetry.test_report import result_of
from tests.plans import gpus, planned

DATA = DataFacts(path="/cache/tokens", samples=100, train_samples=90, held_out_samples=10, tokens=5000, longest=128)
PLAN = planned("llama-7b", gpus(1, 80), {"data.path": "tatsu-lab/alpaca", "seq_len": 128}, data=DATA)


def folded() -> RunHistory:
    fold = RunHistory(total_steps=5)
    steps = [
        Event(kind="step", step=n, total_steps=5, loss=3.0 - 0.2 * n, tokens=100, seconds=1.0, time=float(n))
        for n in range(1, 6)
    ]
    held_out = [Event(kind="eval", step=n, held_out_loss=loss, time=float(n)) for n, loss in ((0, 2.9), (5, 2.0))]
    fold.add([Event(kind="start", total_steps=5), held_out[0], *steps, held_out[1]])
    return fold


def card(plan: Plan = PLAN, **more: Any) -> str:
    base = {"name": "alpaca", "plan": plan, "fold": folded(), "result": result_of(plan)}
    return card_text(Card(**(base | more)))


def front_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_front_matter_is_what_the_hub_reads() -> None:
    text = card(base="huggyllama/llama-7b", license="mit", data_sets=("tatsu-lab/alpaca",))
    assert text.startswith("---\n")
    assert front_of(text) == {
        "base_model": "huggyllama/llama-7b",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "datasets": ["tatsu-lab/alpaca"],
        "tags": ["qdist", "qlora", "lora", "4-bit"],
    }


def test_what_is_not_known_is_left_out() -> None:
    front = front_of(card())
    assert not {"base_model", "base_model_relation", "license", "datasets"} & set(front)


def test_a_merged_model_is_of_transformers() -> None:
    text = card(of="merged", base="a/b", merged="It was merged onto the dequantized weights, in bfloat16.")
    assert (front_of(text)["library_name"], front_of(text)["base_model_relation"]) == ("transformers", "finetune")
    assert "onto the dequantized weights" in text
    assert "peft" not in text


def test_losses_memory_and_speed_are_told() -> None:
    text = card()
    assert "| 0 | - | 2.9 | 18.17 |  |" in text
    assert "| 5 | 2 | 2 | 7.389 | best |" in text
    assert "| Data | tatsu-lab/alpaca: 90 samples and 10 held out, 5,000 tokens |" in text
    assert "| Peak memory, GPU 0 (rank 0) |" in text
    assert "| 6.0 GiB |" in text
    assert "| 4,684 | 4,000 | +17.1 % |" in text


def test_every_row_of_losses_has_a_cell_for_each_task() -> None:
    fold = folded()
    fold.add([Event(kind="eval", step=5, task="mmlu:/home/me/mmlu.jsonl", figure=0.25, time=6.0)])
    header, _, *rows = card(fold=fold).partition("## Loss\n\n")[2].partition("\n\n")[0].splitlines()
    assert header == "| step | training loss | held-out loss | perplexity | mmlu:mmlu.jsonl |  |"
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert rows[-1] == "| 5 | 2 | 2 | 7.389 | 0.25 | best |"


def test_figures_have_the_intervals_of_the_table() -> None:
    result = TaskResult(
        task="loss", figures=(Figure(name="loss", value=1.5, count=20),), outcomes=(1.0, 2.0) * 10, settings={}
    )
    text = card(evaluations=(Evaluation(target="r", what="adapter", results=(result,)),))
    (row,) = [line for line in text.splitlines() if line.startswith("| loss | loss | adapter | 1.5 |")]
    assert " to " in row


def test_an_adapter_of_an_earlier_step_says_so() -> None:
    assert "It is the checkpoint of step 3 of 5." in card(step=3)
    assert "It is the checkpoint" not in card(step=5)


def test_the_last_figures_of_each_task_are_told() -> None:
    def of(value: float, what: Any) -> Evaluation:
        figure = Figure(name="accuracy", value=value, count=1000, low=value - 0.03, high=value + 0.03)
        result = TaskResult(task="mmlu:/home/me/mmlu.jsonl", figures=(figure,), settings={"shots": 0})
        return Evaluation(target="/home/me/runs/alpaca", what=what, results=(result,))

    text = card(evaluations=(of(0.25, "base"), of(0.3, "adapter"), of(0.31, "adapter")))
    assert "| mmlu:mmlu.jsonl | accuracy | base | 0.25 | 0.22 to 0.28 | 1,000 | shots 0 |" in text
    assert "| mmlu:mmlu.jsonl | accuracy | adapter | 0.31 | 0.28 to 0.34 | 1,000 | shots 0 |" in text
    assert "| 0.3 |" not in text


def test_figures_have_the_intervals_of_the_report() -> None:
    figure = Figure(name="accuracy", value=0.5, count=10)
    result = TaskResult(task="mmlu:m.jsonl", figures=(figure,), outcomes=(1.0,) * 5 + (0.0,) * 5)
    text = card(evaluations=(Evaluation(target="runs/alpaca", what="adapter", results=(result,)),))
    assert "| mmlu:m.jsonl | accuracy | adapter | 0.5 | 0.2366 to 0.7634 | 10 |  |" in text


def test_no_folder_of_the_machine_is_named() -> None:
    spec = msgspec.structs.replace(
        PLAN.spec,
        model="/home/me/models/tiny",
        data=msgspec.structs.replace(PLAN.spec.data, path="/home/me/a.jsonl:0.7,~/private/b.jsonl#200"),
    )
    text = card(
        msgspec.structs.replace(PLAN, spec=spec),
        commands=(
            "__main__.py launch --model /home/me/models/tiny --data '/home/me/my data/a.jsonl' --run ../../secret/r",
        ),
    )
    assert "A LoRA adapter (r=64 alpha=16) for tiny." in text
    assert "a.jsonl:0.7, b.jsonl#200: 90 samples" in text
    assert "qdist launch --model tiny --data a.jsonl --run r" in text
    assert not [word for word in ("/home", "private", "secret", "my data", "/cache") if word in text]


def test_text_of_a_user_stays_in_its_cell() -> None:
    text = card(name="a | b\n# c <script>")
    assert "# a \\| b # c \\<script\\>\n" in text


def test_a_card_is_known_until_somebody_changes_it() -> None:
    text = card()
    assert is_ours(text)
    assert not is_ours(text.replace("# alpaca", "# My alpaca"))
    assert not is_ours(text + "More.\n")
    assert not is_ours("# Mine\n")
    assert not is_ours("")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("qdist launch /x/r.toml --data=/y/a.jsonl,/z/b.jsonl", "qdist launch r.toml --data=a.jsonl,b.jsonl"),
        ("qdist launch --model meta-llama/Llama-3.2-1B", "qdist launch --model meta-llama/Llama-3.2-1B"),
        ("qdist launch --set data.eval=~me/e.jsonl --run runs/1", "qdist launch --set data.eval=e.jsonl --run runs/1"),
        ("qdist launch --set train.tasks=mmlu:/home/me/m.jsonl", "qdist launch --set train.tasks=mmlu:m.jsonl"),
        ('qdist launch --set \'data.columns={"a":"/home/me/x"}\'', 'qdist launch --set \'data.columns={"a":"x"}\''),
        ("qdist launch --data file:///home/me/a.jsonl:0.7", "qdist launch --data file:a.jsonl:0.7"),
        ("qdist launch --model ./models/mine", "qdist launch --model mine"),
        ("qdist launch 'open quote", ""),
    ],
)
def test_a_command_names_files_without_their_folders(command: str, shown: str) -> None:
    assert without_folders(command) == shown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: []\n---\n# x", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("# x\nlicense: mit\n", ""),
        ("---\ntags: [license]\n---\nlicense: mit\n", ""),
    ],
)
def test_a_license_is_read_from_the_front_matter(text: str, found: str) -> None:
    assert license_of(text) == found
