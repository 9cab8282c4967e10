"""Does `qdist runs` fit its window, say what failed, and answer where there is nothing?"""

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.cli.runs import table
from qdist.host.run.listing import Listed
from tests.plans import CPU, planned

FINISHED = Listed(
    path="runs/llama-7b-qlora-alpaca", state="finished", model="llama-7b", method="qlora", bits=4,
    data="data/alpaca.json", step=100, steps=100, loss=1.2345, held_out_loss=1.3, tokens_per_s=12345.6, device="cuda",
    gpu_hours=12.3,
    started=time.mktime((2026, 5, 4, 3, 2, 0, 0, 0, -1)), planned=0.0,
)  # fmt: skip
FAILED = Listed(
    path="runs/broken", state="failed", why="rank 1 died", model="m", device="cpu", cpu_rank_hours=0.0043, steps=9,
    planned=0.0,
)  # fmt: skip


def qdist(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(main, ["runs", *arguments], env={"COLUMNS": str(columns)}, prog_name="qdist")


def test_a_wide_window_shows_every_column() -> None:
    head, finished, failed, *rest = table([FINISHED, FAILED], base=Path("runs"), width=130)
    columns = ["name", "state", "step", "loss", "held-out", "tok/s", "hours", "model", "data", "started"]
    assert head.split() == columns
    assert " ".join(finished.split()) == (
        "llama-7b-qlora-alpaca \x1b[32mfinished\x1b[0m 100/100 1.234 1.300 12,346 12.30 GPU llama-7b alpaca.json "
        "2026-05-04 03:02"
    )
    assert " ".join(failed.split()) == "broken \x1b[31mfailed \x1b[0m 0/9 - - - <0.01 CPU m random -"
    assert rest == ["", "broken: rank 1 died"]


def test_no_color_is_honoured_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU)))
    (tmp_path / "r" / "events").mkdir()
    (tmp_path / "r" / "events" / "rank000.jsonl").touch()
    for environment, coloured in (({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)):
        done = CliRunner().invoke(main, ["runs", str(tmp_path)], color=True, env=environment)
        assert "killed" in done.output
        assert ("\x1b" in done.output) == coloured


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (100, ["started"]),
        (80, ["data", "hours", "started"]),
        (60, ["data", "hours", "model", "started", "tok/s"]),
    ],
)
def test_a_narrow_window_loses_columns_and_says_which(width: int, gone: list[str]) -> None:
    lines = table([FINISHED], base=Path("runs"), width=width)
    assert len(lines[0]) <= width
    assert sorted(lines[-1].partition(": ")[2].partition(";")[0].split(", ")) == gone
    assert not set(gone) & set(lines[0].split())
    assert "llama-7b-qlora-alpaca" in lines[1]


def test_a_name_that_is_wider_than_the_window_stays_whole() -> None:
    name = "x" * 100
    lines = table([msgspec.structs.replace(FAILED, path=f"runs/{name}")], base=Path("runs"), width=80)
    assert lines[0].split() == ["name", "state"]
    assert name in lines[1]


def test_names_cannot_move_the_cursor() -> None:
    lines = table([msgspec.structs.replace(FAILED, path="runs/a\x1b[2Jb", why="\x1b[2J")], base=Path("runs"), width=80)
    assert "\x1b[2J" not in "".join(lines)


def test_no_runs_is_a_sentence_and_one_thing_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = qdist()
    assert result.exit_code == 0
    assert result.stdout.startswith("no runs in runs\n  try: qdist launch ")
    assert json.loads(qdist("--json").stdout) == []
    assert qdist("nowhere").exit_code == 2


def test_the_json_has_the_state_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/plan.json").write_text('{"version": 1}')
    (row,) = json.loads(qdist(str(tmp_path), "--json").stdout)
    assert (row["state"], row["path"]) == ("unreadable", str(tmp_path / "r"))
    assert "plan version 1" in row["why"]


def test_listing_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU)))
    code = (
        "import sys\nfrom qdist.cli.main import main\n"
        f"main(['runs', {str(tmp_path)!r}], prog_name='qdist', standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["r", "planned", "0/5"]
    assert lines[-1] == "False"
