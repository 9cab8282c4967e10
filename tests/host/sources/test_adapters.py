"""Of which step is an adapter? From the header of a file that is written here by hand."""

import json
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.core.spec.run_spec import resolve
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER, adapter_step, step_metadata, step_note, step_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Of 60 steps, with checkpoints of 20 and 40."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = {"model": "smollm2-135m", "load_format": "dummy", "steps": 60, "seq_len": 64}
    job = prepare.prepare(resolve(settings, {"run": str(tmp_path / "run")}))
    claim.write(job)
    for step in (20, 40):
        job.run.checkpoint(step).mkdir()
        (job.run.checkpoint(step) / "DONE").touch()
    return job.run


def put(run: RunDir, header: bytes) -> None:
    run.adapter.mkdir(exist_ok=True)
    (run.adapter / ADAPTER).write_bytes(len(header).to_bytes(8, "little") + header + b"tensors")


@pytest.mark.parametrize(
    ("said", "found", "note"),
    [
        (step_metadata(20, 60), (20, 60), "adapter of step 20 of 60"),
        (step_metadata(20, 60, checkpoint="best"), (20, 60), "adapter of step 20 of 60 (checkpoint best)"),
        (step_metadata(20, 20), (20, 60), "adapter of step 20 of 60"),  # resumed since, with more steps
        (step_metadata(60, 60, checkpoint="best"), (60, 60), ""),
        ({}, None, ""),
        ({"step": "x"}, None, ""),
    ],
)
def test_an_adapter_says_of_which_step_it_is(
    run: RunDir, said: dict[str, str], found: tuple[int, int] | None, note: str
) -> None:
    put(run, json.dumps({"__metadata__": {"format": "pt", **said}, "a": {"dtype": "F32"}}).encode())
    assert adapter_step(run) == found
    assert step_note(run) == note


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"{}", b'{"__metadata__": 3}', b"\xff"])
def test_a_file_that_says_nothing_has_no_step(run: RunDir, header: bytes) -> None:
    put(run, header)
    assert (adapter_step(run), step_note(run)) == (None, "")


def test_a_run_without_an_adapter_has_no_step(run: RunDir) -> None:
    assert (adapter_step(run), step_note(run)) == (None, "")


@pytest.mark.parametrize(("which", "step"), [("last", 40), ("20", 20), ("best", None)])
def test_a_checkpoint_is_named_without_reading_it(run: RunDir, which: str, step: int | None) -> None:
    assert step_of(run, which) == step


@pytest.mark.parametrize("which", ["30", "newest", "-1", "²"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run: RunDir, which: str) -> None:
    with pytest.raises(RunError, match="has no checkpoint") as caught:
        step_of(run, which)
    assert caught.value.try_ == "--checkpoint last, best or a step: 20, 40"
