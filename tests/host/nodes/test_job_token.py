"""Does a job of SLURM find one token on all nodes, which nobody else can read?"""

import stat
from pathlib import Path

import pytest

from qdist.core.errors import RunError, SpecError
from qdist.core.nodes.places import Place
from qdist.host.nodes.job_token import token_of

JOB = {"SLURM_JOB_ID": "17"}
FIRST, SECOND = Place(0, 2, 2, "a:1", "SLURM"), Place(1, 2, 2, "a:1", "SLURM")


def silent(_: object) -> None:
    """Neither prints nor waits."""


def test_the_first_node_leaves_a_token_that_its_user_alone_can_read(tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    with token_of(run, FIRST, JOB, say=silent) as own:
        (file,) = run.parent.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with token_of(run, SECOND, JOB, say=silent) as other:
            assert own == other
            assert len(own) == 32
        assert file.exists()
    assert not list(run.parent.iterdir())


def test_the_others_wait_for_it(tmp_path: Path) -> None:
    said: list[str] = []

    def wait(_: float) -> None:
        (tmp_path / ".one.17.token").touch(mode=0o600)
        (tmp_path / ".one.17.token").write_text("0123456789abcdef0123\n")

    with token_of(tmp_path / "one", SECOND, JOB, say=said.append, wait=wait) as token:
        assert token == "0123456789abcdef0123"
    assert said == [f"waiting for the first node's token in {tmp_path}, for 60 s at most"]


def test_without_a_shared_disk_the_others_say_how_to_make_one(tmp_path: Path) -> None:
    with (
        pytest.raises(SpecError, match=r"left none in .* \(is it on a disk that the nodes share\?\)") as error,
        token_of(tmp_path / "one", SECOND, JOB, say=silent, wait=silent),
    ):
        pass
    assert error.value.try_ == "export QDIST_TOKEN=$(openssl rand -hex 16) before srun"


def test_a_job_that_starts_again_keeps_the_token_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / ".one.17.token"
    file.touch(mode=0o600)
    file.write_text("0123456789abcdef0123\n")
    with token_of(tmp_path / "one", FIRST, JOB, say=silent) as token:
        assert token == "0123456789abcdef0123"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="the run's token cannot be written to"),
        token_of(tmp_path / "file/one", FIRST, JOB, say=silent),
    ):
        pass


@pytest.mark.parametrize("place", [FIRST, Place(0, 2, 2, "a:1", "--node-rank")])
def test_a_token_of_the_users_goes_first(place: Place, tmp_path: Path) -> None:
    with token_of(tmp_path / "one", place, {"QDIST_TOKEN": "x" * 16}, say=silent) as token:
        assert token == "x" * 16
    assert not list(tmp_path.iterdir())


def test_nodes_started_by_hand_need_a_token(tmp_path: Path) -> None:
    with (
        pytest.raises(SpecError, match="no token for the run"),
        token_of(tmp_path / "one", Place(0, 2, 2, "a:1", "--node-rank"), {}, say=silent),
    ):
        pass
