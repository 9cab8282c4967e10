import pytest
import torch

from qdist.runtime.kernels.decode_attention import choose_splits, decode_attention, write_kv

HEADS, SHARED, SIZE, PLACES = 4, 2, 8, 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(query, keys, values, length, window, sink, softcap):
    """One head of one row."""
    begin = max(0, length - window) if window else 0
    scores = keys[begin:length] @ query * 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shares = torch.exp(scores)
    return (shares @ values[begin:length]) / (shares.sum() + (0.0 if sink is None else torch.exp(sink)))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.1, -1.0, 2.0, 0.0])])
def test_each_row_sees_the_keys_that_it_has(window: int, softcap: float | None, sinks: torch.Tensor | None) -> None:
    query, keys = random(3, HEADS, 1, SIZE), random(4, SHARED, PLACES, SIZE, seed=1)
    values = random(4, SHARED, PLACES, SIZE, seed=2)
    lengths = torch.tensor([1, PLACES, 3])
    values[2, :, 3:], keys[2, :, 3:] = float("nan"), float("nan")  # what another answer left behind
    found = decode_attention(query, keys, values, lengths, 0.5, window, sinks=sinks, softcap=softcap)
    assert found.shape == (3, 1, HEADS, SIZE)
    for row in range(3):
        for head in range(HEADS):
            pair = keys[row, head // 2], values[row, head // 2]
            sink = None if sinks is None else sinks[head]
            wanted = by_hand(query[row, head, 0], *pair, int(lengths[row]), window, sink, softcap)
            assert torch.allclose(found[row, 0, head], wanted, atol=1e-6)


@pytest.mark.parametrize("sinks", [None, torch.zeros(HEADS)])
def test_a_row_without_keys_gives_zeros(sinks: torch.Tensor | None) -> None:
    keys = torch.full((1, SHARED, PLACES, SIZE), float("nan"))
    found = decode_attention(random(1, HEADS, 1, SIZE), keys, keys, torch.tensor([0]), 0.5, sinks=sinks)
    assert torch.equal(found, torch.zeros(1, 1, HEADS, SIZE))


def test_new_keys_and_values_are_stored_behind_those_of_their_row_and_a_full_row_is_left_alone() -> None:
    keys, values = random(2, SHARED, 1, SIZE, seed=3), random(2, SHARED, 1, SIZE, seed=4)
    cache_keys, cache_values = torch.zeros(3, SHARED, PLACES, SIZE), torch.zeros(3, SHARED, PLACES, SIZE)
    write_kv(keys, values, cache_keys, cache_values, torch.tensor([2, PLACES]))
    assert torch.equal(cache_keys[0, :, 2], keys[0, :, 0])
    assert torch.equal(cache_values[0, :, 2], values[0, :, 0])
    cache_keys[0, :, 2] = cache_values[0, :, 2] = 0
    assert not cache_keys.any()
    assert not cache_values.any()


@pytest.mark.parametrize(("pairs", "keys", "wanted"), [(32, 4096, 16), (32, 320, 4), (1024, 4096, 1), (1, 10, 1)])
def test_few_rows_share_their_keys_among_more_programs(pairs: int, keys: int, wanted: int) -> None:
    assert choose_splits(pairs, keys) == wanted
