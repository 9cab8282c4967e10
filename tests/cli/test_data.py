"""Does `qdist data` read what `qdist launch` would, and exit with 1 on what that would refuse?"""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli import data
from qdist.cli.main import main
from qdist.core.requests import Answer, ShowData
from qdist.runtime.train import overview

RECORDS = '{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two records, where requests are handled by this process."""

    def ask(request: ShowData) -> Answer:
        return Answer(overview=overview.run(request))

    monkeypatch.setattr(data, "ask", ask)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    Path("a.jsonl").write_text(RECORDS)
    return tmp_path


def qdist(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, ("data", *arguments), input=stdin, prog_name="qdist")


@pytest.mark.parametrize("stdin", [RECORDS, gzip.compress(RECORDS.encode())])
def test_standard_input_is_read(stdin: str | bytes) -> None:
    result = qdist("show", "-", "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["records"] == 2


def test_samples_may_be_left_out() -> None:
    assert "a.jsonl:1" in qdist("show", "a.jsonl").stdout
    assert "a.jsonl:1" not in qdist("show", "a.jsonl", "--samples", "0").stdout


@pytest.mark.parametrize(
    ("arguments", "stderr"),
    [
        (("a.jsonl",), ""),
        (("a.jsonl", "--set", "train.held_out=5"), "train.held_out=5 leaves none of 2 samples to train on"),
        (("bad.jsonl",), "1 record of 3 cannot be used"),
        (("bad.jsonl", "--set", "data.skip_bad=1"), ""),
        (("none.jsonl",), "nothing in 1 record is to be learned"),
        (("a.jsonl", "--eval-data", "bad.jsonl"), "1 record of 5 cannot be used"),
    ],
)
def test_a_check_ends_with_1_on_what_training_would_refuse(arguments: tuple[str, ...], stderr: str) -> None:
    Path("bad.jsonl").write_text(RECORDS + "{\n")
    Path("none.jsonl").write_text('{"input": "a", "output": ""}\n')
    result = qdist("check", *arguments)
    assert result.exit_code == bool(stderr), result.output
    assert stderr in result.stderr


def test_what_a_check_says_to_try_works() -> None:
    Path("bad.jsonl").write_text(RECORDS + "{\n")
    tried = qdist("check", "bad.jsonl").stderr.rpartition("--set ")[2].split()[0]
    assert qdist("check", "bad.jsonl", "--set", tried).exit_code == 0
    tried = qdist("check", "a.jsonl", "--set", "train.held_out=5").stderr.rpartition("--set ")[2].split()[0]
    assert qdist("check", "a.jsonl", "--set", tried).exit_code == 0


def test_a_file_in_place_of_a_command_is_answered_with_the_command() -> None:
    result = qdist("a.jsonl")
    assert (result.exit_code, "qdist data show a.jsonl" in result.stderr) == (2, True)
