"""Settings that are typed as flags."""

import pytest
from click.testing import CliRunner

from qdist.cli.main import main


@pytest.mark.parametrize("command", ["launch", "plan"])
@pytest.mark.parametrize(
    ("typed", "attempt"),
    [
        (("--steps", "5"), "--set steps=5"),
        (("--seq-len=256",), "--set seq_len=256"),
        (("--lr", "1e-4"), "--set optim.lr=1e-4"),
        (("--learning-rate", "1e-4"), "--set optim.lr=1e-4"),
        (("--lora-r", "8"), "--set lora.r=8"),
        (("--new_tokens", "<a b>"), "--set 'new_tokens=<a b>'"),
        (("--epochs",), "--set epochs=VALUE"),
        (("--epochs", "--bits", "4"), "--set epochs=VALUE"),
        (("--seed", "-1"), "--set seed=-1"),
    ],
)
def test_a_setting_that_is_typed_as_a_flag_is_told(command: str, typed: tuple[str, ...], attempt: str) -> None:
    result = CliRunner().invoke(main, [command, "--model", "llama-7b", *typed], prog_name="qdist")
    assert result.exit_code == 2
    key = attempt.removeprefix("--set ").strip("'").partition("=")[0]
    assert result.stderr == f"error: {typed[0].partition('=')[0]} is no flag: {key} is a setting\n  try: {attempt}\n"


@pytest.mark.parametrize("flag", ["--gpu", "--output", "--zzz"])
def test_what_is_no_setting_either_is_told_by_click(flag: str) -> None:
    result = CliRunner().invoke(main, ["launch", flag, "2"], prog_name="qdist")
    assert (result.exit_code, f"No such option '{flag}'" in result.stderr) == (2, True), result.output
