"""Dropout of adapted linears: masks drawn anew from a seed, with nothing kept of them."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdist.runtime.adapters.attach import FusedLora, adapt
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.engine.torch import Adapter, MicroBatch, TorchEngine
from qdist.runtime.kernels.dropout import Mask, dropped, kept
from qdist.runtime.model.dropout_seed import DropoutSeed, dropout_seed_of

SEED = (1 << 62) + 12345678912345


def mask(seed: int = SEED, constant: int = 7, share: float = 0.25) -> Mask:
    return Mask(torch.tensor([seed]), constant, share)


def test_masks_do_not_change_between_releases() -> None:
    """A resumed run goes on with them."""
    rows = ["".join("01"[bit] for bit in row) for row in kept(mask(), 3, 24).int().tolist()]
    assert rows == ["110010101111110100111101", "100111100110111010110111", "000110111110000110001011"]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_share_dropped_is_what_was_asked_for_in_all_and_in_every_row(share: float) -> None:
    lost = (~kept(mask(share=share), 1024, 2048)).float()
    deviation = (share * (1 - share)) ** 0.5
    assert float(lost.mean()) == pytest.approx(share, abs=4 * deviation / lost.numel() ** 0.5)
    for side in (0, 1):
        spread = float(lost.mean(side).std()) * lost.shape[side] ** 0.5
        assert spread == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(
    "other",
    [mask(SEED + 1), mask(SEED + (1 << 32)), mask(constant=8), mask(SEED ^ 15, 7 ^ 15)],
    ids=["next seed", "next high word", "another linear", "both swapped"],
)
def test_masks_of_other_seeds_and_linears_are_independent(other: Mask) -> None:
    first, second = (kept(each, 512, 1024).float() - 0.75 for each in (mask(), other))
    assert abs(float((first * second).mean())) < 4 * 0.1875 / first.numel() ** 0.5


def test_neighbours_in_a_mask_are_independent() -> None:
    values = kept(mask(), 1024, 1024).float() - 0.75
    corners = values[::2, ::2] * values[1::2, ::2] * values[::2, 1::2] * values[1::2, 1::2]
    assert abs(float(corners.mean())) < 4 * 0.1875**2 / corners.numel() ** 0.5
    for shifted in (values.roll(1, 0), values.roll(1, 1), values.roll((1, 1), (0, 1))):
        assert abs(float((values * shifted).mean())) < 4 * 0.1875 / values.numel() ** 0.5


@pytest.mark.parametrize("pool", [1, 2])
def test_gradients_with_dropout_are_those_of_finite_differences(pool: int) -> None:
    layer = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    shapes = ((2, 3, 6), (4, 6 // pool), (5, 4))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_product(x, a, b, layer, 0.7, mask()), leaves)


def test_pooled_inputs_are_dropped_before_they_are_pooled() -> None:
    """As in PEFT's QA-LoRA."""
    layer, (inputs, down, up) = nn.Linear(8, 5), (torch.randn(*shape) for shape in ((6, 8), (3, 4), (5, 3)))
    pooled = dropped(inputs, mask()).view(6, 4, 2).mean(-1) / 0.75
    wanted = layer(inputs) + 0.5 * pooled @ down.t() @ up.t()
    torch.testing.assert_close(adapted_product(inputs, down, up, layer, 0.5, mask()), wanted)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def adapted(share: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Two(), LoraConfig(r=4, lora_dropout=share, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    return model.train()


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_nothing_is_kept_of_a_mask_and_evaluation_has_none() -> None:
    sizes = []
    for share in (0.0, 0.5):
        model, seen = adapted(share), list[torch.Size]()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, seen=seen: (seen.append(tensor.shape), tensor)[1], lambda held: held
        )
        with hooks:
            model(torch.ones(3, 8))
        sizes.append(seen)
    assert sizes[0] == sizes[1]
    assert torch.equal(adapted(0.0).eval()(torch.ones(3, 8)), adapted(0.5).eval()(torch.ones(3, 8)))


def test_each_linear_has_a_constant_of_its_own_and_all_have_one_seed() -> None:
    model = adapted()
    layers = [module for module in model.modules() if isinstance(module, FusedLora)]
    assert len({layer.constant for layer in layers}) == 2
    assert {id(layer.seed) for layer in layers} == {id(dropout_seed_of(model))}


def test_a_recomputed_layer_draws_the_masks_of_its_micro_batch() -> None:
    """Two in flight, as in a pipeline: the backward pass of the first comes after the forward pass of the second."""
    inputs = torch.randn(2, 3, 8)
    model, wanted = adapted(), []
    for seed in (1, 2):
        dropout_seed_of(model).write(seed)
        model(inputs[seed - 1]).sum().backward()
    wanted = gradients_of(model)
    model, outputs = adapted(), []
    seed_of = dropout_seed_of(model)
    for seed in (1, 2):
        seed_of.write(seed, in_flight=True)
        given = inputs[seed - 1].clone().requires_grad_()
        outputs.append(checkpoint(model, given, use_reentrant=False, context_fn=seed_of.contexts))
    for output in outputs:
        output.sum().backward()
    for own, other in zip(gradients_of(model), wanted, strict=True):
        torch.testing.assert_close(own, other)


def test_a_seed_is_written_in_place_for_graphs_and_anew_for_pipelines() -> None:
    seed, device = DropoutSeed(), torch.device("cpu")
    tensor = seed.on(device)
    seed.write(5)
    assert seed.on(device) is tensor
    assert tensor.tolist() == [5]
    seed.write(6, in_flight=True)
    assert (tensor.tolist(), seed.on(device).tolist()) == ([5], [6])


def test_an_engine_draws_a_mask_for_each_micro_batch() -> None:
    model, batch = adapted(), {"inputs": torch.randn(3, 8)}
    adapter = Adapter(model, lambda given: model(given["inputs"]).square().sum())
    engine = TorchEngine(adapter, torch.optim.AdamW(adapter.parameters()), clip=1.0)
    losses = [
        float(engine.accumulate([MicroBatch(lambda: batch, seed)], weight=1.0, loss_scale=1.0)) for seed in (1, 2, 1)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]
