"""Is a folder's fingerprint that of its tensors, wherever and whenever they were written?"""

import os
import shutil
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.core.planning.plan import Source
from qdist.host.sources.model_folder import fingerprint, require_same_tensors

HEADER = b'{"a":{"dtype":"U8","shape":[100],"data_offsets":[0,100]}}'


def save(folder: Path, *, header: bytes = HEADER, size: int = 100, name: str = "model.safetensors") -> Path:
    folder.mkdir()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return folder


def source_of(folder: Path, recorded: str) -> Source:
    return Source(kind="folder", path=str(folder), packed=str(folder), config={}, tokenizer="", fingerprint=recorded)


def test_a_copy_with_other_times_and_other_small_files_is_the_same(tmp_path: Path) -> None:
    one = save(tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "moved" / "other")
    os.utime(other / "model.safetensors", (1, 1))
    (other / "README.md").write_text("mine")
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize("size", [100, 5_000, 262_000, 10_000_000])
def test_other_tensors_show(tmp_path: Path, size: int) -> None:
    folder = save(tmp_path / "one", size=size)
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    for place in (8 + len(HEADER), file.stat().st_size - 1):
        whole = bytearray(file.read_bytes())
        whole[place] ^= 1
        file.write_bytes(whole)
        assert fingerprint(folder) != before
        whole[place] ^= 1
        file.write_bytes(whole)
    assert fingerprint(folder) == before


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", size=64 * 4096 - 8 - len(HEADER))
    file, before = folder / "model.safetensors", fingerprint(folder)
    whole = file.read_bytes()
    for place in range(0, len(whole), 4095):
        file.write_bytes(whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :])
        assert fingerprint(folder) != before, place


def test_headers_sizes_and_names_show(tmp_path: Path) -> None:
    long = HEADER + b" " * 1_000_000
    folders = [
        save(tmp_path / "one"),
        save(tmp_path / "size", size=101),
        save(tmp_path / "name", name="other.safetensors"),
        save(tmp_path / "long", header=long),
        save(tmp_path / "within", header=long[:500_000] + b"\n" + long[500_001:]),
    ]
    (save(tmp_path / "gone") / "model.safetensors").unlink()
    assert len({fingerprint(folder) for folder in (*folders, tmp_path / "gone")}) == 6


def test_a_file_that_the_index_names_and_is_gone_shows(tmp_path: Path) -> None:
    folder = save(tmp_path / "one")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    before = fingerprint(folder)
    (folder / "stray.safetensors").write_bytes(b"")
    assert fingerprint(folder) == before
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder) != before


def test_what_is_no_safetensors_has_a_fingerprint_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "one")
    for content in (b"", b"abc", b"\xff" * 5_000):
        (folder / "model.safetensors").write_bytes(content)
        assert len(fingerprint(folder)) == 64


def test_a_replaced_model_is_refused_and_a_run_without_a_record_is_not(tmp_path: Path) -> None:
    folder = save(tmp_path / "g2k")
    recorded = fingerprint(folder)
    require_same_tensors(source_of(folder, recorded), str(folder), run="runs/chg")
    shutil.rmtree(folder)
    save(folder, size=101)
    with pytest.raises(RunError, match=r"g2k is not the model that runs/chg was trained on: .* and was ") as caught:
        require_same_tensors(source_of(folder, recorded), str(folder), run="runs/chg")
    assert caught.value.try_ == "put that model back in its place, or start a new run on this one"
    require_same_tensors(source_of(folder, ""), str(folder), run="runs/chg")
