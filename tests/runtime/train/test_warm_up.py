"""Files are read ahead where they stay in memory, and a machine without a file goes on."""

from pathlib import Path

import pytest

from qdist.core.machine.world import LocalRank
from qdist.runtime.train import warm_up
from tests.runtime.tiny import plan_of, save_config


def files(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(1000))
    return paths


def test_files_are_read_to_their_ends_and_a_missing_one_is_left_to_who_needs_it(tmp_path: Path) -> None:
    assert warm_up.read_ahead(files(tmp_path)) == 2000
    assert warm_up.read_ahead([tmp_path / "a", tmp_path / "gone", tmp_path / "b"]) == 1000


@pytest.mark.parametrize(("available", "wanted"), [(4001, True), (4000, False), (0, False)])
def test_what_would_fill_the_memory_is_not_read_ahead(tmp_path: Path, available: int, wanted: bool) -> None:
    assert warm_up.fit_memory(files(tmp_path), available) is wanted


def test_ranks_on_cpus_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "read_ahead", None)
    warm_up.warm_up(plan_of(save_config(tmp_path / "model"), tmp_path / "run"), LocalRank(0))
