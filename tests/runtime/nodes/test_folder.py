import errno
import os
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host.run.rundir import STOP, RunDir
from qdist.runtime.nodes.folder import forget_old_stop, require_folder, unusable


@pytest.mark.parametrize(("age_s", "stays"), [(3600, False), (0, True)])
def test_a_request_to_stop_that_an_earlier_launch_did_not_heed_ends_no_later_one(
    tmp_path: Path, age_s: int, stays: bool
) -> None:
    run = RunDir(tmp_path)
    forget_old_stop(run)
    stop = tmp_path / STOP
    stop.touch()
    then = stop.stat().st_mtime - age_s
    os.utime(stop, (then, then))
    forget_old_stop(run)
    assert run.stop_requested() == stays


def test_a_run_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        require_folder(tmp_path / "file" / "run")


def test_a_full_disk_is_said_with_the_name_of_its_node() -> None:
    error = unusable("birch", Path("/run"), OSError(errno.ENOSPC, "No space left on device"))
    assert error.message == "birch: /run cannot be used: No space left on device"
