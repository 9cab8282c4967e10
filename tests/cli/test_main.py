import os
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from qdist.cli import main as cli
from qdist.cli.doctor import report
from qdist.core.errors import JobError, PlanError, QdistError, SpecError
from qdist.host.machine.doctor import Check


def qdist(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_click_alone(argument: str) -> None:
    code = (
        "import sys\nfrom qdist.cli.main import main\n"
        f"main([{argument!r}], prog_name='qdist', standalone_mode=False)\n"
        "print(sorted({'rich', 'msgspec', 'torch', 'transformers', 'packaging'} & set(sys.modules)))"
    )
    assert qdist("-c", code).stdout.splitlines()[-1] == "[]"


def test_python_m_qdist_is_qdist() -> None:
    done = qdist("-m", "qdist", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: qdist ")
    assert [name for name in cli.COMMANDS if f"\n  {name} " not in done.stdout] == []


def test_doctor_loads_no_torch_and_says_whether_the_machine_is_ready() -> None:
    code = (
        "import sys\nfrom qdist.cli.main import main\n"
        "code = main(['doctor'], prog_name='qdist', standalone_mode=False)\nprint(code, 'torch' in sys.modules)"
    )
    done = qdist("-c", code)
    assert done.stdout.splitlines()[-1] in ("0 False", "1 False"), done.stderr
    assert "Python" in done.stdout


def invoked(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, raises: BaseException | None = None
) -> click.testing.Result:
    """Run the group with one command, `launch`, that does nothing or raises."""

    @click.command()
    @click.option("--micro-batch")
    def launch(micro_batch: str | None) -> None:
        if raises is not None:
            raise raises

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(launch=launch))
    return CliRunner().invoke(cli.main, arguments, prog_name="qdist")


@pytest.mark.parametrize(
    ("error", "code"),
    [(SpecError("bits is 5", try_="--bits 4"), 2), (PlanError("bits is 5", try_="--bits 4"), 2),
     (JobError("bits is 5", try_="--bits 4"), 1)],
)  # fmt: skip
def test_an_error_is_two_lines_and_no_traceback(error: QdistError, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoked(monkeypatch, "launch", raises=error)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: bits is 5\n  try: --bits 4\n"


@pytest.mark.parametrize(
    ("interrupt", "said"),
    [
        (KeyboardInterrupt(), "stopped\n"),
        (KeyboardInterrupt(""), "stopped\n"),
        (KeyboardInterrupt("the same command goes on"), "stopped; the same command goes on\n"),
    ],
)
def test_an_interrupt_stops_with_the_shells_code(
    interrupt: KeyboardInterrupt, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoked(monkeypatch, "launch", raises=interrupt)
    assert (result.exit_code, result.stderr) == (130, said)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(invoked(monkeypatch, "launch", raises=ZeroDivisionError()).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["lanch"], "lanch is not a command\n  try: qdist launch\n"),
        (["docter", "--help"], "docter is not a command\n  try: qdist doctor\n"),
        (["zzzz"], "zzzz is not a command\n  try: launch, plan, "),
        (["launch", "--micro-bach", "4"], "--micro-bach is not a flag\n  try: --micro-batch\n"),
        (["launch", "--micro-batch"], "option '--micro-batch' requires an argument\n  try: qdist launch --help\n"),
        (["launch", "4"], "got unexpected extra argument (4)\n  try: qdist launch --help\n"),
        (["--verion"], "--verion is not a flag\n  try: --version\n"),
        (["\udcff"], "'\\udcff' is not UTF-8\n  try: rename the file"),
    ],
)
def test_a_typo_names_the_nearest(arguments: list[str], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoked(monkeypatch, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {hint}")


def test_without_a_command_the_commands_are_listed() -> None:
    result = CliRunner().invoke(cli.main, [], prog_name="qdist")
    assert "Usage: qdist" in result.output
    assert "error:" not in result.output


def test_each_line_of_help_fits_a_terminal() -> None:
    assert max(len(line) for _, line in cli.COMMANDS.values()) <= 66


def test_a_report_has_a_line_a_check_and_its_remedy_below() -> None:
    checks = (Check("torch", "ok", "2.13"), Check("GPU 0", "fail", "gone", "look for it"))
    assert click.unstyle(report(checks)).splitlines() == [
        "ok    torch  2.13",
        "fail  GPU 0  gone",
        "             try: look for it",
        "",
        "1 of 2 checks failed: runs will not work here until they are mended",
    ]
