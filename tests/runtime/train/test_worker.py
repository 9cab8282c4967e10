"""Does a rank leave whole events, whatever the disk does?"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.telemetry.events import Event, decode_lines
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.rank import Reporter


def test_half_a_line_on_a_full_disk_ends_the_rank_and_is_cut_off_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    write = os.write

    def reporter() -> Any:
        return Reporter(run, 0, (torch.device("cpu"),))

    report = reporter()
    report(Event(kind="step", step=1))
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
        with pytest.raises(OSError, match="no room for the events of rank 0"):
            report(Event(kind="step", step=2))
    reporter()(Event(kind="step", step=3))
    assert [event.step for event in decode_lines(run.event_file(0).read_bytes())] == [1, 3]
