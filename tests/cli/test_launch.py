"""Does `qdist launch` print what it would do, refuse in two lines, and touch nothing until it starts?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.core.model.aliases import config_of
from qdist.core.spec.run_spec import RunSpec
from qdist.host import tasks
from qdist.host.files import locked
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import LOCK
from tests.host.sources.test_gguf_header import LLAMA, header

SMALL = ("--model", "smollm2-135m", "--load-format", "dummy", "--gpus", "2", "--set", "seq_len=64")

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="qdist")


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def written(name: str) -> prepare.Launch:
    job = prepare.prepare(RunSpec(model="smollm2-135m", load_format="dummy", steps=5, seq_len=64, run=name))
    claim.write(job)
    return job


def test_a_dry_run_prints_the_plan_and_the_script_and_writes_nothing(here: Path) -> None:
    (here / "runs").mkdir()
    before = listing(here)
    result = qdist("launch", *SMALL, "--set", "steps=5", "--dry-run")
    assert result.exit_code == 0, result.output
    assert listing(here) == before
    heads = [line.split()[0] for line in result.stdout.splitlines()[:11]]
    assert heads == ["model", "adapter", "ranks", "layout", "engine", "batch", "steps", "memory", "at", "load", "disk"]
    assert "2 CPU processes" in result.stdout
    assert "run      runs/smollm2-135m-qlora-dummy, not created; its launch.sh:\n\n#!/bin/sh\n" in result.stdout
    assert " -P -m qdist.host.launch.agent 2 " in result.stdout


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and the time when it was changed."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's folder with everything in it that a command could write to: home, caches, temporary files, work."""
    work = here / "work"
    for name, variable in (("home", "HOME"), ("tmp", "TMPDIR"), ("work", "PWD")):
        (here / name).mkdir()
        monkeypatch.setenv(variable, str(here / name))
    for variable in ("QDIST_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    config = config_of("smollm2-135m")
    (work / "model").mkdir()
    (work / "model/config.json").write_text(json.dumps(config))
    (work / "model/model.safetensors").touch()
    (work / "model.gguf").write_bytes(header(LLAMA, ("token_embd.weight",)))
    (work / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 10)
    monkeypatch.chdir(work)
    return here


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--model", "model", "--data", "data.jsonl"],
         ["would pack     model to 4 bits nf4, 106 MiB, in HOME/packed", "would tokenize data.jsonl (20 records), in "
          "HOME/tokens", "steps    2 over 18 samples, 2 held out"]),
        (["--model", "model", "--data", "data.jsonl", "--bits", "16"], ["would tokenize data.jsonl (20 records)"]),
        (["--model", "model", "--data", "owner/name"],
         ["would fetch    owner/name from the hub (only the hub knows its size)", "would tokenize owner/name, in "]),
        (["--model", "qwen2.5-0.5b", "--data", "demo"],
         ["would fetch    Qwen/Qwen2.5-0.5B from the hub (about 942 MiB in 16 bits)", "would tokenize demo (640 rec"]),
        (["--model", "owner/unheard-of", "--data", "demo"],
         ["would fetch    owner/unheard-of from the hub (only the hub knows its size)", "plan     known once"]),
        (["--model", "model.gguf", "--data", "demo"],
         ["would convert  model.gguf to a bfloat16 folder, 145 KiB, in HOME/models", "would pack     model.gguf to 4"]),
        (["--model", "model", "--load-format", "dummy", "--set", "steps=9"], ["steps    9"]),
    ],
)  # fmt: skip
def test_a_dry_run_on_an_empty_machine_writes_nothing_anywhere_and_says_what_it_would(
    arguments: list[str], wanted: list[str], whole: Path
) -> None:
    before = tree(whole)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "qdist", "launch", "--dry-run", "--set", "seq_len=64", *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(whole) == before
    for line in wanted:
        assert line.replace("HOME", str(whole / "home/.cache/qdist")) in done.stdout
    assert "not created" in done.stdout


def test_steps_that_nobody_can_count_yet_are_not_shown(whole: Path) -> None:
    result = qdist("launch", "--dry-run", "--model", "model", "--data", "owner/name", "--set", "seq_len=64")
    assert result.exit_code == 0, result.output
    assert "\nsteps " not in result.stdout
    assert "steps and the longest sample are known once owner/name is fetched and tokenized" in result.stdout


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--data", "data.jsonl", "--model", "gone.gguf"], "no file gone.gguf"),
        (["--data", "data.jsonl", "--run", "data.jsonl/run"], "data.jsonl/run cannot be written"),
        (["--data", "data.jsonl", "--run", "model"], "model exists and is not a run"),
        (["--data", "data.jsonl", "--placement", "split"], "placement=split"),
    ],
)
def test_what_the_file_system_tells_is_refused_before_a_child_starts(
    arguments: list[str], message: str, dry_run: bool, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(tasks, "run_task", start)
    before = tree(whole)
    more = ["--dry-run"] if dry_run else []
    result = qdist("launch", "--model", "model", "--set", "seq_len=64", *arguments, *more)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert {path: size for path, (size, _) in tree(whole).items()} == {path: size for path, (size, _) in before.items()}


def test_a_cache_that_cannot_be_written_is_told_before_a_child_starts(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", "data.jsonl")
    result = qdist("launch", "--model", "model", "--data", "data.jsonl", "--set", "seq_len=64")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the cache data.jsonl cannot be written: it is a file\n  try: QDIST_CACHE=")


def test_flags_win_over_a_recipe(here: Path) -> None:
    (here / "mine.toml").write_text("model = 'smollm2-135m'\nload_format = 'dummy'\nsteps = 5\n[lora]\nr = 8\n")
    result = qdist("launch", "mine.toml", "--gpus", "1", "--set", "lora.alpha=3", "--set", "steps=7", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "recipe   mine.toml\n" in result.stdout
    assert "LoRA r=8 alpha=3:" in result.stdout
    assert "steps    7\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        (("--placement", "shard"), "shard: 2 groups of 2; each rank holds 1/2 of every layer and gathers it for use"),
        (("--placement", "split"), "split: 2 groups of 2; each rank a stage of layers (0-"),
    ],
)  # fmt: skip
def test_the_placement_can_be_named(arguments: tuple[str, ...], layout: str) -> None:
    result = qdist(
        "launch", *SMALL, "--gpus", "4", "--gpus-per-group", "2", "--set", "steps=5", *arguments, "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert f"layout   {layout}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no model was named\n  try: --model smollm2-135m\n"),
        ((*SMALL, "--set", "lora.rank=3"), "error: unknown setting 'lora.rank'\n  try: --set lora.r=3\n"),
        ((*SMALL, "--set", "learning_rate=0.1"), "error: unknown setting 'learning_rate'\n  try: --set optim.lr=0.1\n"),
        ((*SMALL, "--set", "lora.r"), "error: 'lora.r' is not key=value\n  try: --set lora.r=32\n"),
        ((*SMALL, "--bits", "5"), "error: bits cannot be '5': it is one of 2, 3, 4, 8, 16\n  try: --bits 4\n"),
        ((*SMALL, "--max-memory", "1GiB", "--set", "steps=1"), "error: --max-memory caps GPUs, and this machine has "
         "none\n  try: --max-memory auto\n"),
        ((*SMALL, "--placement", "shards"), "error: placement cannot be 'shards': it is one of replicate, shard, "
         "split\n  try: --placement shard\n"),
        ((*SMALL, "--gpus-per-group", "3", "--set", "steps=1"), "error: gpus_per_group=3, but 2 CPU ranks cannot be "
         "divided so\n  try: --gpus-per-group 2\n"),
        ((*SMALL, "--set", "train.verify_steps=5"), "error: train.verify_steps=5 compares the bytes of a sharded "
         "backbone\n  try: --set train.verify_steps=0\n"),
        (("guanaco-7", "--dry-run"), "error: no recipe 'guanaco-7'\n  try: guanaco-7b\n"),
        (("--resume",), "error: --resume goes with --run DIR alone: the run knows its recipe\n"
         "  try: qdist launch --resume --run runs/NAME\n"),
        (("demo", "--resume", "--run", "run"), "error: --resume goes with --run DIR alone: the run knows its recipe\n"
         "  try: qdist launch --resume --run runs/NAME\n"),
    ],
)  # fmt: skip
def test_a_wrong_setting_ends_in_two_lines_and_code_2(arguments: tuple[str, ...], message: str, here: Path) -> None:
    result = qdist("launch", *arguments)
    assert (result.exit_code, result.stderr) == (2, message)
    assert listing(here) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "run", *SMALL), "error: run holds an unfinished run with no checkpoint yet\n"),
        (("--run", "gone", "--resume"), "error: gone is not a run: it has no plan.json\n"),
        (
            ("--model", "lama-7b", "--load-format", "dummy"),
            "error: no model is called 'lama-7b': no run, folder, file or alias here has that name",
        ),
    ],
)
def test_what_is_not_as_it_must_be_ends_with_code_2(arguments: tuple[str, ...], message: str, here: Path) -> None:
    written("run")
    before = listing(here)
    result = qdist("launch", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert listing(here) == before


def test_resuming_says_from_where_and_a_dry_run_changes_nothing(here: Path) -> None:
    job = written("run")
    job.run.checkpoint(3).mkdir()
    (job.run.checkpoint(3) / "DONE").touch()
    contents = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    result = qdist("launch", "--resume", "--run", "run", "--gpus", "2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("resuming run from step 3\n")
    assert "2 CPU processes" in result.stdout
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == contents


def test_a_run_goes_on_as_shards_that_are_verified(here: Path) -> None:
    written("run")
    result = qdist(
        "launch", "--resume", "--run", "run", "--gpus", "2", "--placement", "shard", "--set", "train.verify_steps=2",
        "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "layout   shard: the 2 ranks; each rank holds 1/2 of every layer" in result.stdout
    refused = qdist("launch", "--resume", "--run", "run", "--set", "train.verify_steps=2", "--dry-run")
    assert (refused.exit_code, refused.stderr.splitlines()[1]) == (2, "  try: --set train.verify_steps=0")


def test_a_finished_run_is_not_resumed() -> None:
    job = written("run")
    (job.run.path / "result.json").write_text('{"steps": 5}')
    result = qdist("launch", "--resume", "--run", "run")
    assert (result.exit_code, result.stdout) == (0, "run is finished: 5 steps, adapter in run/adapter\n")


def test_a_run_that_ended_early_is_not_resumed_silently() -> None:
    job = written("run")
    (job.run.path / "result.json").write_text('{"steps": 5, "ended_early": "stopped early at step 5 of 9"}')
    result = qdist("launch", "--resume", "--run", "run")
    assert (result.exit_code, result.stdout.splitlines()) == (0, [
        "run is finished: 5 steps, adapter in run/adapter; it stopped early at step 5 of 9",
        "  to go on all the same: qdist launch --resume --run run --set train.patience=0",
    ])  # fmt: skip


def test_a_run_in_training_is_not_planned_anew(here: Path) -> None:
    job = written("run")
    before = (job.run.path / "plan.json").stat().st_mtime_ns
    with locked(job.run.path / LOCK):
        result = qdist("launch", "--resume", "--run", "run")
    assert (result.exit_code, result.stderr) == (
        2, "error: run is being trained by another process\n  try: qdist monitor run\n",
    )  # fmt: skip
    assert (job.run.path / "plan.json").stat().st_mtime_ns == before


def test_a_run_that_dies_says_why_and_keeps_its_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks cannot start where `sh` finds no interpreter at the path that planned the run."""
    monkeypatch.setattr("sys.executable", "/no/such/python")
    result = qdist("launch", *SMALL, "--set", "steps=5", "--run", "run")
    assert result.exit_code == 1
    assert "error: the ranks ended with exit code 127:\n  | " in result.stderr
    assert "/no/such/python" in result.stderr
    assert os.path.exists(here / "run/plan.json")
