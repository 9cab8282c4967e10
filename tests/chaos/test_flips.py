"""A bit that flips in any kind of file that is read is named, or changes nothing that is read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.chaos.flips import Flip, Kind, flipped, kinds
from bench.chaos.ground import Ground


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kind]]:
    ground = Ground(tmp_path_factory.mktemp("flips"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDIST_CACHE", str(ground.folder / "cache"))
        yield kinds(ground)


@pytest.mark.parametrize("name", ["packed", "adapter", "optimizer", "offsets", "gptq", "gguf", "tokens"])
def test_no_flipped_bit_goes_unseen(there: dict[str, Kind], name: str) -> None:
    outcome = flipped(there[name], 12, seed=1)
    assert outcome.unseen == ()
    assert outcome.named + outcome.harmless == 12
    assert outcome.named >= 8


def test_a_reader_that_looks_at_nothing_is_found_out(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    assert len(flipped(Kind((file,), file.read_bytes), 3, seed=0).unseen) == 3
    assert flipped(Kind((file,), lambda: None), 3, seed=0).harmless == 3
    assert file.read_bytes() == bytes(100)
    assert str(Flip(file, 3, 7)) == "file byte 3 bit 7"
