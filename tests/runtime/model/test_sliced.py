"""Ranks keep parts of a unit's bytes; the parts one after the other are its parameters, to the byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qdist.core.errors import ModelError
from qdist.runtime.formats.checksum import tensor_checksum
from qdist.runtime.model import weights
from qdist.runtime.model.packed import empty
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.sliced import ALIGNMENT, Layout, Sliced, Unit, bytes_in_part, kept_bytes, lay_out
from qdist.runtime.model.weights import FolderWeights
from tests.runtime.pretended import CPU, Pretended, join


@pytest.mark.parametrize(
    ("sizes", "ranks", "layout"),
    [
        ((), 2, Layout((), 0)),
        ((1,), 1, Layout((0,), 256)),
        ((256, 256), 2, Layout((0, 256), 256)),
        ((257, 1, 100), 2, Layout((0, 512, 768), 512)),
        ((100,), 3, Layout((0,), 256)),
        ((1000, 1000), 3, Layout((0, 1024), 768)),
    ],
)
def test_tensors_and_parts_begin_at_whole_alignments(sizes: tuple[int, ...], ranks: int, layout: Layout) -> None:
    assert lay_out(sizes, ranks) == layout
    assert layout.part_bytes % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("start", "size", "parts"),
    [
        (0, 100, [(0, 100), (0, 0), (0, 0)]),
        (256, 300, [(0, 256), (256, 300), (0, 0)]),
        (256, 1200, [(0, 256), (256, 768), (768, 1200)]),
        (1024, 7, [(0, 0), (0, 0), (0, 7)]),
    ],
)
def test_each_byte_of_a_tensor_is_in_one_part(start: int, size: int, parts: list[tuple[int, int]]) -> None:
    assert [bytes_in_part(start, size, part=part, part_bytes=512) for part in range(3)] == parts


SHAPES = {
    "words": ((40, 9), torch.int32), "absmax": ((777,), torch.uint8), "scales": ((3, 5, 7), torch.float16),
    "norm": ((33,), torch.bfloat16), "decay": ((1,), torch.float32), "single": ((), torch.float32),
}  # fmt: skip


class Layer(nn.Module):
    """Parameters of all dtypes and uneven sizes; one of them stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        for name, (shape, dtype) in SHAPES.items():
            self.register_parameter(name, empty(shape, dtype))
        self.inner = nn.Module()
        self.inner.words = self.words
        self.register_buffer("nested", torch.empty(2), persistent=False)


def stored() -> dict[str, torch.Tensor]:
    """Values of random bits, NaN patterns among them."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (shape, dtype) in SHAPES.items():
        like = torch.empty(shape, dtype=dtype)
        found[name] = torch.randint(0, 256, (like.nbytes,), dtype=torch.uint8, generator=generator).view(dtype)
        found[name] = found[name].view(shape)
    return {f"layer.{name}": value for name, value in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(stored(), tmp_path / "model.safetensors")
    return tmp_path


def filled(folder: Path, *, rank: int, ranks: int) -> tuple[nn.Module, Unit]:
    model = nn.Module()
    model.layer = Layer()
    own = list(model.layer.parameters())
    unit = Unit("layer", model.layer, own, peers=Pretended(rank, ranks), device=CPU)
    expected = {name: tensor_checksum(value) for name, value in stored().items()}
    fill(model, FolderWeights(folder, expected if ranks == 1 else None), device=CPU)
    return model, unit


@pytest.mark.parametrize("lazy", [False, True], ids=["small tensors", "tensors read by rows"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_are_read_from_a_folder_and_give_its_bytes_back(
    folder: Path, ranks: int, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lazy:
        monkeypatch.setattr(weights, "_COPIED_ELEMENTS", 1)
    made = [filled(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
    model, unit = made[0]
    assert all(each.bytes == ranks * len(each.part) for _, each in made)
    assert sum(len(kept_bytes(each.layer.words)) for each, _ in made) == 40 * 9 * 4
    assert all(parameter.is_meta for parameter in model.layer.parameters()), "nothing holds the whole of it yet"

    unit.lay_into(join([each for _, each in made]))
    for name, value in stored().items():
        parameter = getattr(model.layer, name.removeprefix("layer."))
        assert isinstance(parameter, Sliced)
        assert (parameter.shape, parameter.dtype, parameter.requires_grad) == (value.shape, value.dtype, False)
        assert parameter.reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name
    assert model.layer.inner.words is model.layer.words


def test_parts_are_held_against_the_sums_of_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_COPIED_ELEMENTS", 1)
    filled(folder, rank=0, ranks=1)
    changed = stored()
    changed["layer.words"][39, 8] ^= 1
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"the bytes of layer\.words are not those that were written"):
        filled(folder, rank=0, ranks=1)


def test_a_buffer_that_is_filled_anew_is_no_change_of_what_autograd_has_saved(folder: Path) -> None:
    model, unit = filled(folder, rank=0, ranks=1)
    buffer = torch.zeros(unit.bytes, dtype=torch.uint8)
    unit.lay_into(buffer)
    inputs = torch.ones(1, requires_grad=True)
    loss = (inputs * model.layer.decay).sum()
    buffer.copy_(unit.part)
    loss.backward()
    assert inputs.grad is not None
    assert inputs.grad.view(torch.int32).equal(stored()["layer.decay"].view(torch.int32))
