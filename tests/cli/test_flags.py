"""Settings that are typed as flags."""

import json

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from qdist.cli.main import main
from qdist.core.spec.lookup import typed_settings


@pytest.mark.parametrize("command", ["launch", "plan"])
@pytest.mark.parametrize(
    ("typed", "attempt"),
    [
        (("--dropout", "0.1"), "--set lora.dropout=0.1"),
        (("--warmup-steps=9",), "--set optim.warmup_steps=9"),
        (("--lora-alpha", "8"), "--set lora.alpha=8"),
        (("--new_tokens", "<a b>"), "--set 'new_tokens=<a b>'"),
        (("--packing",), "--set pack=true"),
        (("--sample-packing", "false"), "--set pack=false"),
        (("--loraplus-lr-ratio", "16"), "--set optim.lr_ratio_b=16"),
        (("--optim", "adamw_8bit"), "--set optim.name=adamw-8bit"),
        (("--clip",), "--set optim.clip=VALUE"),
        (("--clip", "--bits", "4"), "--set optim.clip=VALUE"),
        (("--clip", "-1"), "--set optim.clip=-1"),
    ],
)
def test_a_setting_that_is_typed_as_a_flag_is_told(command: str, typed: tuple[str, ...], attempt: str) -> None:
    result = CliRunner().invoke(main, [command, "--model", "llama-7b", *typed], prog_name="qdist")
    assert result.exit_code == 2
    key = attempt.removeprefix("--set ").strip("'").partition("=")[0]
    assert result.stderr == f"error: {typed[0].partition('=')[0]} is not a flag: {key} is a setting\n  try: {attempt}\n"


@pytest.mark.parametrize(
    ("flag", "attempt"), [("--gpu", "--gpus"), ("--output", "qdist launch --help"), ("--zzz", "qdist launch --help")]
)
def test_what_is_no_setting_either_is_told_in_the_same_form(flag: str, attempt: str) -> None:
    result = CliRunner().invoke(main, ["launch", flag, "2"], prog_name="qdist")
    assert (result.exit_code, result.stderr) == (2, f"error: {flag} is not a flag\n  try: {attempt}\n")


@pytest.mark.parametrize("command", ["launch", "plan"])
@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [("--learning-rate", "1e-4", "--lr"), ("--base-model", "llama-7b", "--model"), ("--lora_rank", "8", "--lora-r")],
)
def test_what_other_programs_call_a_flag_is_answered_with_ours(
    command: str, theirs: str, value: str, ours: str
) -> None:
    result = CliRunner().invoke(main, [command, theirs, value], prog_name="qdist")
    assert (result.exit_code, result.stderr) == (
        2, f"error: {theirs} is not a flag: its flag is {ours}\n  try: {ours} {value}\n",
    )  # fmt: skip


def test_what_everybody_types_is_a_flag() -> None:
    typed = {"steps": "5", "epochs": None, "lr": "1e-4", "batch_size": "8", "seq_len": "64", "lora_r": "4", "bits": "8"}
    assert typed_settings(typed, ("seed=3",)) == {
        "steps": "5", "optim.lr": "1e-4", "global_batch": "8", "seq_len": "64", "lora.r": "4", "bits": "8", "seed": "3",
    }  # fmt: skip


def test_what_an_error_says_to_try_wins_over_what_was_typed_before_it() -> None:
    assert typed_settings({"lr": "5"}, ("optim.lr=1", "optim.lr=2e-4")) == {"optim.lr": "2e-4"}


def test_a_flag_reaches_the_plan() -> None:
    line = ["plan", "--model", "llama-7b", "--gpus", "1", "--gpu-memory", "48GiB", "--json", "--lora-r", "8"]
    result = CliRunner().invoke(main, line, prog_name="qdist")
    assert json.loads(result.stdout)["spec"]["lora"]["r"] == 8


@pytest.mark.parametrize(
    ("typed", "begun", "offered"),
    [
        ([], "la", ["launch"]),
        (["launch"], "--batch", ["--batch-size"]),
        (["plan", "--placement"], "s", ["shard", "split"]),
        (["export", "RUN", "--to"], "g", ["gguf", "gptq"]),
        (["launch", "--nope", "x"], "--adap", ["--adapter"]),
        (["nonsense"], "--x", []),
    ],
)
def test_a_shell_completes_commands_flags_and_choices(typed: list[str], begun: str, offered: list[str]) -> None:
    found = BashComplete(main, {}, "qdist", "_QDIST_COMPLETE").get_completions(typed, begun)
    assert [item.value for item in found if item.type == "plain"] == offered


def test_a_flag_of_launch_is_not_answered_with_itself() -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "llama-7b", "--data", "my.jsonl"], prog_name="qdist")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --data is a flag of launch, and plan does without it\n"
        "  try: leave it out, or qdist launch with --dry-run\n"
    )


@pytest.mark.parametrize("theirs", ["--use_rslora", "--bf16"])
def test_a_name_of_others_with_other_values_leads_to_what_it_is_here(theirs: str) -> None:
    result = CliRunner().invoke(main, ["launch", theirs, "true"], prog_name="qdist")
    assert result.exit_code == 2
    assert f"try: qdist settings {theirs[2:]}" in result.stderr


def test_a_help_page_begins_with_what_is_required_and_shows_defaults_of_zero() -> None:
    page = CliRunner().invoke(main, ["generate", "--help"], prog_name="qdist").stdout
    flags = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    assert flags[:3] == ["--prompts", "--out", "--batch"]
    assert flags.index("--gpus") < flags.index("--max-memory")
    assert " ".join(page.split()).count("[default: 0]") == 4  # temperature, top-k, min-p, seed


def test_the_page_takes_no_flags_of_vllm() -> None:
    page = CliRunner().invoke(main, ["web", "--help"], prog_name="qdist").stdout
    assert "vllm" not in page
    assert "--out" not in page
