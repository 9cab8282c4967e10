"""Layers are gathered one ahead of their use, in an order that the passes alone decide, no more often than needed."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qdist.core.errors import JobError
from qdist.runtime.placements.gathers import Gathers, slice_units
from tests.runtime.pretended import CPU, Pretended

WIDTH, VOCAB = 8, 32
LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3")
FORWARD = ["embedding", *LAYERS, "head"]
BACKWARD = ["layers.1", "layers.0"]
"""The last two layers are still there when the backward pass begins."""


class Layer(nn.Module):
    """A frozen product, whose backward pass reads the weights again, with an adapter beside it if `adapted`."""

    def __init__(self, *, adapted: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False)
        self.delta = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH) if adapted else None

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        product = functional.linear(torch.tanh(hidden) * self.norm, self.weight)
        if self.delta is not None:
            product = product + functional.linear(hidden, self.delta)
        return hidden + product, None


class Decoder(nn.Module):
    def __init__(self, adapted: range) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(adapted=index in adapted) for index in range(len(LAYERS)))
        self.call: Callable[..., Any] = lambda layer, hidden: layer(hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden, _ = self.call(layer, hidden)
        return hidden


class Model(nn.Module):
    def __init__(self, adapted: range = range(len(LAYERS))) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(adapted)
        self.head = nn.Linear(WIDTH, VOCAB).requires_grad_(False)

    def loss(self, seed: int) -> torch.Tensor:
        ids = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(seed))
        return functional.cross_entropy(self.head(self.decoder(ids)).flatten(0, 1), ids.flatten())


class Sharded(Model):
    """The same model over buffers, of which one rank has all parts."""

    def __init__(self, adapted: range = range(len(LAYERS)), tables: bool = True) -> None:
        super().__init__(adapted)
        trained = dict(self.named_parameters())
        values = {name: value.detach().clone() for name, value in trained.items() if not value.requires_grad}
        adapters = [(layer, layer.delta) for layer in self.decoder.layers]
        for layer, _ in adapters:
            layer.delta = None
        paths = [f"decoder.{name}" for name in LAYERS] + ["decoder.embedding", "head"] * tables
        self.peers = Pretended()
        units = list(slice_units(self, paths, peers=self.peers, device=CPU))
        for unit in units:
            for slot in unit.slots:
                slot.parameter.kept_elements.copy_(values[slot.path].reshape(-1))
        self.gathers = Gathers(units[: len(LAYERS)], units[len(LAYERS) :], peers=self.peers, device=CPU)
        for layer, delta in adapters:
            layer.delta = delta
        self.gathers.watch(self.decoder, list(self.decoder.layers), self.decoder.embedding)
        names = (path.removeprefix("decoder.") for path in paths)
        self._names = {unit.part.data_ptr(): name for unit, name in zip(units, names, strict=True)}

    def order(self) -> list[str]:
        """Units in the order in which they were gathered since the last call."""
        found = [self._names[part.data_ptr()] for part in self.peers.gathered]
        self.peers.gathered.clear()
        return found


def gradients(model: Model) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad


def recompute(model: Model, way: str) -> None:
    """Have layers recomputed as transformers does it, around the hooks of a layer, or as we do, inside of them."""
    if way == "outside":
        model.decoder.call = lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=False)
    if way == "inside":
        for layer in model.decoder.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@pytest.mark.parametrize("way", ["kept", "outside", "inside"])
def test_a_micro_batch_gathers_each_layer_once_a_pass_and_computes_what_whole_layers_do(way: str) -> None:
    whole, sharded = Model(), Sharded()
    recompute(whole, way)
    recompute(sharded, way)
    for seed in range(3):
        losses = whole.loss(seed), sharded.loss(seed)
        for loss in losses:
            loss.backward()
        assert losses[0].equal(losses[1])
        assert sharded.order() == FORWARD + BACKWARD
    pairs = list(zip(gradients(whole), gradients(sharded), strict=True))
    assert len(pairs) == len(LAYERS)
    assert all(one.equal(other) for one, other in pairs)


def test_an_evaluation_gathers_for_one_pass() -> None:
    whole, sharded = Model(), Sharded()
    with torch.no_grad():
        assert sharded.loss(0).equal(whole.loss(0))
    assert sharded.order() == FORWARD


def test_an_evaluation_between_passes_changes_nothing_of_them() -> None:
    sharded = Sharded()
    for _ in range(2):
        sharded.loss(0).backward()
        assert sharded.order() == FORWARD + BACKWARD
        with torch.no_grad():
            sharded.loss(1)
        assert sharded.order() == FORWARD


def test_no_layer_is_gathered_that_the_backward_pass_does_not_come_to() -> None:
    sharded = Sharded(adapted=range(1, 4))
    sharded.loss(0).backward()
    assert sharded.order() == [*FORWARD, "layers.1"]


def test_tables_that_are_whole_are_not_gathered() -> None:
    whole, sharded = Model(), Sharded(tables=False)
    loss = sharded.loss(0)
    loss.backward()
    assert loss.equal(whole.loss(0))
    assert sharded.order() == [*LAYERS, *BACKWARD]


def test_layers_in_turn_share_a_buffer_and_neighbours_do_not() -> None:
    sharded = Sharded()
    at = [layer.weight.data_ptr() for layer in sharded.decoder.layers]
    assert at[0] == at[2] != at[1] == at[3]
    assert sharded.decoder.embedding.weight.data_ptr() == sharded.head.weight.data_ptr()
    frozen = [parameter for parameter in sharded.parameters() if not parameter.requires_grad]
    assert len({parameter.untyped_storage().data_ptr() for parameter in frozen}) == 3


def test_the_check_gathers_every_unit_and_names_a_tensor_that_arrives_with_another_bit() -> None:
    sharded = Sharded()
    checked = sharded.gathers.check()
    assert checked == sum(parameter.nbytes for parameter in sharded.parameters() if not parameter.requires_grad)
    assert sorted(sharded.order()) == sorted(FORWARD)
    norm, gather = sharded.decoder.layers[2].norm, sharded.peers.gather

    def turn_a_bit(whole: torch.Tensor, part: torch.Tensor) -> None:
        gather(whole, part)
        if part is sharded.gathers.layers[2].part:
            norm.view(torch.int32)[3] ^= 1

    sharded.peers.gather = turn_a_bit
    with pytest.raises(JobError, match=r"^decoder\.layers\.2\.norm: the bytes gathered from the ranks are not"):
        sharded.gathers.check()


def test_what_stands_in_two_units_stays_whole() -> None:
    model = Model()
    model.decoder.layers[3].norm = model.decoder.layers[1].norm
    paths = [f"decoder.{name}" for name in LAYERS]
    units = list(slice_units(model, paths, peers=Pretended(), device=CPU))
    assert [[slot.name for slot in unit.slots] for unit in units] == [
        ["weight", "norm", "delta"], ["weight", "delta"], ["weight", "norm", "delta"], ["weight", "delta"],
    ]  # fmt: skip


def test_a_layer_of_which_everything_stands_elsewhere_too_is_not_gathered() -> None:
    model = Model()
    model.decoder.layers[2] = model.decoder.layers[0]
    peers = Pretended()
    units = list(slice_units(model, [f"decoder.{name}" for name in LAYERS], peers=peers, device=CPU))
    gathers = Gathers(units, (), peers=peers, device=CPU)
    gathers.begin()
    for index in range(len(LAYERS)):
        gathers.enter(index)
    assert [unit.bytes > 0 for unit in units] == [False, True, False, True]
    assert [part is units[index].part for part, index in zip(peers.gathered, (1, 3), strict=True)] == [True, True]
    assert gathers.check() == sum(slot.parameter.nbytes for unit in units for slot in unit.slots)
