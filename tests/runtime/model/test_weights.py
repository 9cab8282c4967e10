"""What of a folder of weights stays in a rank's memory once it has been read?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qdist.core.errors import ModelError
from qdist.runtime.model.weights import FolderWeights, whole

LARGE = 1 << 19


@pytest.fixture
def folder(tmp_path: Path) -> FolderWeights:
    save_file({"large": torch.arange(LARGE), "small": torch.arange(64.0)}, tmp_path / "model.safetensors")
    return FolderWeights(tmp_path)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_small_tensor_keeps_no_mapping_of_its_file_once_all_is_read(folder: FolderWeights) -> None:
    small = folder.open("small")
    folder.check()
    assert not mapped(folder.folder / "model.safetensors")
    assert torch.equal(small[:], torch.arange(64.0))
    assert torch.equal(small[8:16], torch.arange(8.0, 16.0))


def test_one_file_is_open_at_a_time(folder: FolderWeights) -> None:
    save_file({"number": torch.tensor(0.5)}, folder.folder / "other.safetensors")
    folder.open("small")
    assert mapped(folder.folder / "model.safetensors")
    folder.open("number")
    assert not mapped(folder.folder / "model.safetensors")


def test_a_large_tensor_stays_where_ranks_share_it(folder: FolderWeights) -> None:
    large = folder.open("large")[:]
    assert mapped(folder.folder / "model.safetensors")
    assert torch.equal(large, torch.arange(LARGE))


def test_a_single_number_is_read_too(folder: FolderWeights) -> None:
    save_file({"number": torch.tensor(0.5)}, folder.folder / "other.safetensors")
    assert whole(folder.open("number")) == 0.5


def test_a_tensor_that_is_missing_is_named(folder: FolderWeights) -> None:
    with pytest.raises(ModelError, match="has no tensor other"):
        folder.open("other")
