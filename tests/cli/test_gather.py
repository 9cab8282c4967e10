"""Does `qdist gather` refuse what file names tell, before anything is started?"""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli import gather
from qdist.cli.main import main
from qdist.core.requests import Gather, Request
from qdist.core.spec.run_spec import resolve
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """With checkpoints of steps 20 and 40 of 60."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = {"model": "smollm2-135m", "load_format": "dummy", "steps": 60, "seq_len": 64}
    job = prepare.prepare(resolve(settings, {"run": "run"}))
    claim.write(job)
    for step in (20, 40):
        job.run.checkpoint(step).mkdir()
        (job.run.checkpoint(step) / "DONE").touch()
    return job.run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What would have been started."""
    calls: list[Request] = []
    monkeypatch.setattr(gather, "run_task", calls.append)
    return calls


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["gather", *arguments], prog_name="qdist")


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        (["run"], Gather(run="run")),
        (["run", "--checkpoint", "20"], Gather(run="run", checkpoint="20")),
        (["run", "--checkpoint", "best", "--out", "run/best"], Gather(run="run", checkpoint="best", out="run/best")),
    ],
)
def test_what_can_be_gathered_is(run: RunDir, started: list[Request], arguments: list[str], handed_on: Gather) -> None:
    result = qdist(*arguments)
    assert result.exit_code == 0, result.output
    assert started == [handed_on]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--checkpoint", "30"], "run has no checkpoint '30'\n  try: --checkpoint last, best or a step: 20, 40"),
        (["run", "--out", "run"], "run exists\n  try: another --out"),
        (["run", "--out", "file"], "file exists\n  try: another --out"),
        (["run", "--out", "file/inside"], "file/inside cannot be written: HERE/file is a file\n  try: another --out"),
        (["gone"], "gone is not a run: it has no plan.json\n  try: run"),
    ],
)
def test_what_cannot_be_gathered_is_refused(
    run: RunDir, started: list[Request], arguments: list[str], said: str, tmp_path: Path
) -> None:
    Path("file").touch()
    result = qdist(*arguments)
    assert result.exit_code == 2
    assert result.stderr == f"error: {said.replace('HERE', str(tmp_path))}\n"
    assert started == []
