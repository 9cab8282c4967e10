"""Where do frozen parameters lie in one buffer of bytes, and which of the bytes does a rank keep?"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

ALIGNMENT = 256
"""Bytes. A parameter begins at a multiple of it, whatever its dtype, and so does each rank's part of a buffer."""


class Layout(NamedTuple):
    """Tensors one after the other in a buffer of bytes, which ranks divide into equal contiguous parts."""

    starts: tuple[int, ...]
    """First byte of each tensor."""
    part_bytes: int
    """Bytes of each rank's part."""


def lay_out(sizes: Iterable[int], ranks: int) -> Layout:
    """The layout of tensors of these bytes; what lies between them and behind the last is padding."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += _round_up(size, ALIGNMENT)
    return Layout(tuple(starts), _round_up(end, ranks * ALIGNMENT) // ranks)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def bytes_in_part(start: int, size: int, *, part: int, part_bytes: int) -> tuple[int, int]:
    """The bytes (first, end) of a tensor that lie in a part, counted from the tensor's start; (0, 0) for none.

    start, size: of the tensor in its buffer. part: the index of the part.
    """
    first, end = max(part * part_bytes - start, 0), min((part + 1) * part_bytes - start, size)
    return (first, end) if first < end else (0, 0)


class Peers:
    """The ranks that together hold one backbone. All of them must make the same calls in the same order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Fill `whole` with every rank's part, in the order of the ranks."""
        dist.all_gather_into_tensor(whole, part, group=self.group)

    def add_up(self, values: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        dist.all_reduce(values, group=self.group)


class Sliced(nn.Parameter):
    """A frozen parameter of which this rank keeps some bytes; its values are there while its unit is gathered.

    On the meta device until then. Several of them share memory, as units take turns in a buffer.
    """

    kept: torch.Tensor
    """uint8 [n]: this rank's bytes of it."""
    first_byte: int
    """Where they begin in the parameter."""
    group: Any
    """The ranks with the others."""

    @property
    def kept_elements(self) -> torch.Tensor:
        """`kept` in the parameter's dtype, one-dimensional."""
        return self.kept.view(self.dtype)

    @property
    def first_element(self) -> int:
        """Where they begin in the flattened parameter."""
        return self.first_byte // self.element_size()

    def over(self, data: torch.Tensor) -> "Sliced":
        """The same parameter over the bytes of a buffer.

        `data` gives it a version counter of its own: autograd would take a gather into the buffer for a change of what
        it has saved, though the bytes are those again when a backward pass reads them.
        """
        return sliced(data.view(self.dtype).view(self.shape).data, self.kept, self.first_byte, self.group)


def sliced(data: torch.Tensor, kept: torch.Tensor, first_byte: int, group: Any) -> Sliced:
    """A `Sliced` parameter over a tensor."""
    made = Sliced(data, requires_grad=False)
    made.kept, made.first_byte, made.group = kept, first_byte, group
    return made


class Slot(NamedTuple):
    """A module's parameter in a unit, and where it begins in the unit's buffer."""

    module: nn.Module
    name: str
    path: str
    start: int

    @property
    def parameter(self) -> Sliced:
        """The parameter that the module has now."""
        found = getattr(self.module, self.name)
        assert isinstance(found, Sliced)
        return found


class Unit:
    """Frozen parameters that are gathered together, such as a decoder layer's. Each rank keeps a part of the bytes."""

    def __init__(
        self, path: str, root: nn.Module, own: Sequence[nn.Parameter], *, peers: Peers, device: torch.device
    ) -> None:
        """Replace the parameters `own` of a module on the meta device by sliced ones, whose bytes are zero still.

        path: of the module in the model. device: where this rank's bytes are kept.
        """
        layout = lay_out((parameter.nbytes for parameter in own), peers.count)
        self.part = torch.zeros(layout.part_bytes, dtype=torch.uint8, device=device)
        """uint8 [part_bytes]: what this rank keeps."""
        self.bytes = peers.count * layout.part_bytes
        """Bytes of the whole, padding included."""
        made = {}
        for parameter, start in zip(own, layout.starts, strict=True):
            first, end = bytes_in_part(start, parameter.nbytes, part=peers.rank, part_bytes=layout.part_bytes)
            offset = start + first - peers.rank * layout.part_bytes if end else 0
            kept = self.part[offset : offset + end - first]
            made[parameter] = sliced(parameter.detach(), kept, first, peers.group), start
        self.slots = tuple(_registered(path, root, made))

    def lay_into(self, buffer: torch.Tensor) -> None:
        """Have the parameters be views of a buffer, uint8 [bytes]; their bytes are there once it was gathered into."""
        done: dict[int, Sliced] = {}
        for slot in self.slots:
            if slot.start not in done:
                parameter = slot.parameter
                done[slot.start] = parameter.over(buffer[slot.start : slot.start + parameter.nbytes])
            slot.module.register_parameter(slot.name, done[slot.start])


def _registered(path: str, root: nn.Module, made: dict[nn.Parameter, tuple[Sliced, int]]) -> Iterator[Slot]:
    """Put the made parameters in the places of those they were made of."""
    for inner, module in root.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in made:
                new, start = made[parameter]
                module.register_parameter(name, new)
                yield Slot(module, name, ".".join(filter(None, (path, inner, name))), start)


def kept_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a tensor: some bytes of a sliced one, otherwise all of it."""
    return tensor.kept if isinstance(tensor, Sliced) else tensor
