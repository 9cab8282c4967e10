"""Does `qdist plan --for inference` say how a model would answer, and refuse what belongs to training?"""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.host.machine import probe
from tests.plans import CPU

CARD = ("--gpu-name", "H200")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", "--for", "inference", *arguments], prog_name="qdist")


def decided(*arguments: str) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def lines(output: str) -> dict[str, str]:
    """Lines by their labels."""
    return {line[:9].strip(): line[9:] for line in reversed(output.splitlines())}  # the first of each label


def test_a_plan_for_inference_is_a_few_lines() -> None:
    result = plan("--model", "qwen3-8b", "--batch", "32", "--context", "4096", "--set", "liger=true", *CARD)
    assert result.exit_code == 0, result.output
    found = lines(result.stdout)
    assert set(found) == {"model", "adapters", "answers", "place", "memory", "", "speed", "first", "cards", "note"}
    assert found["model"].startswith("qwen3-8b: 8.2 B parameters, 4 bits nf4, double quantization, bfloat16")
    assert found["adapters"] == "1 of r=64"
    assert found["answers"] == "32 at a time, each of up to 4,096 tokens with its prompt"
    assert found["place"] == "backbone on GPU 0"
    assert found["memory"].endswith(" GiB")
    assert ", cache 18.0 GiB, " in result.stdout
    assert "; 32 together " in found["speed"]
    assert found["speed"].endswith(" each")
    assert "\n         predicted for answers at 2,048 tokens, in the mean, with their prompts\n" in result.stdout
    assert found["first"].startswith("token ")
    assert found["first"].endswith(" after 512")
    assert found["cards"].startswith("RTX 5090, 32 GiB: one answer ")
    assert result.stdout.count(" GiB: one answer ") == 6
    assert " more cards that would do\n" in result.stdout


def test_all_of_it_is_json() -> None:
    found = decided("--model", "llama-7b", "--batch", "4", "--adapters", "3", "--lora-r", "16", *CARD)
    assert (found["batch"], found["context"], found["adapters"]) == (4, 2048, 3)
    assert found["residence"]["layer_gpu"] == [0] * 32
    assert found["tokens_per_second"] > found["tokens_per_second_alone"] > 0
    assert found["cards"][0]["gib"] <= found["cards"][-1]["gib"]
    assert found["memory"]["cache"] == 4 * 2048 * 32 * 2 * 4096 * 2


def test_a_short_model_has_the_context_that_it_has() -> None:
    assert decided("--model", "gpt2", *CARD)["context"] == 1024


@pytest.mark.parametrize("bits", ["4", "16"])
def test_settings_of_the_packing_and_the_adapter_count(bits: str) -> None:
    found = decided("--model", "llama-7b", "--bits", bits, "--set", "lora.targets=q_proj", *CARD)
    assert (found["memory"]["weights"] > 8e9) == (bits == "16")
    assert found["memory"]["adapters"] < 100e6


def test_a_recipe_says_which_model_and_adapter() -> None:
    found = decided("launch/guanaco-7b.toml", *CARD)
    assert (found["spec"]["model"], found["spec"]["lora"]["r"]) == ("llama-7b", 64)


def test_gptq_is_read_as_it_comes() -> None:
    assert decided("--model", "llama-7b", "--method", "gptq-lora", *CARD)["gptq"]["shape"]["bits"] == 4


def test_a_cpu_has_no_speed_and_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: CPU)
    result = plan("--model", "smollm2-135m")
    found = lines(result.stdout)
    assert set(found) == {"model", "adapters", "answers", "place", "memory", "", "note"}
    assert (found["place"], found["note"]) == ("backbone on the CPU", "speed is not predicted on a CPU")
    assert found["memory"].endswith(" of host memory")


def test_layers_in_host_memory_are_told_with_the_memory_that_is_assumed() -> None:
    result = plan("--model", "llama-65b", "--gpu-name", "RTX 4090")
    found = lines(result.stdout)
    assert found["place"].endswith(" of 80 layers are offloaded to host memory")
    assert found["memory"].endswith(" GiB altogether")
    assert "the machine is taken to have 64.0 GiB of host memory: --host-memory" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--batch", "0"), "--batch 0 is not between 1 and 4,096", "--batch 1"),
        (("--context", "4096"), "--context 4,096 is not between 2 and 2,048, the positions of llama-7b",
         "--context 2048"),
        (("--steps", "3"), "steps is a setting of training, and the plan is --for inference", "leave it out; "),
        (("--set", "micro_batch=3"), "micro_batch is a setting of training, and the plan is --for inference",
         "leave it out; settings of inference are model, "),
        (("--device-map",), "--device-map is of plans for training", "--json, "),
        (("--set", "lora.targets=w9"), "llama-7b has no linear 'w9' among ", "--set lora.targets="),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(arguments: tuple[str, ...], message: str, hint: str) -> None:
    result = plan("--model", "llama-7b", *CARD, *arguments)
    assert result.exit_code == 2
    told, tried = result.stderr.split("\n  try: ")
    assert told.startswith(f"error: {message}")
    assert tried.startswith(hint)


def test_flags_of_inference_are_refused_where_a_run_is_planned() -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "llama-7b", *CARD, "--batch", "3"], prog_name="qdist")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --batch is of plans for inference, and this one is for training\n  try: --for inference --batch 3\n"
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--model", "qwen3-8b", "--batch", "8", "--context", "32768", "--gpu-name", "RTX 4090"), "--context 8192"),
        (("--model", "llama-7b", "--batch", "64", "--gpu-memory", "24GiB"), "--context 512"),
        (("--model", "llama-65b", "--bits", "16", "--gpu-name", "RTX 4090"), "--bits 4"),
    ],
)
def test_what_does_not_fit_names_a_change_that_works(arguments: tuple[str, ...], hint: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2
    told, tried = result.stderr.split("\n  try: ")
    assert " more than may be filled: " in told
    assert tried.startswith(hint)
    assert plan(*arguments, *hint.split()).exit_code == 0
