"""Does the simulation of failing nodes count what is done and what is lost?"""

import math

import pytest

from bench.nodes_simulation import DAY_S, Costs, simulate, worked

CALM = Costs(nodes=4, step_s=10.0, network_s=2.0, save_s=0.0, start_s=0.0, mean_s=math.inf)
STORMY = CALM._replace(save_s=5.0, start_s=100.0, mean_s=2 * DAY_S)


def test_a_run_without_failures_and_saves_does_all_that_can_be_done() -> None:
    assert simulate(CALM, interval=50, seconds=DAY_S, seed=0) == (8640, 0, 0, 1.0)


def test_saves_and_starts_cost_what_they_take() -> None:
    outcome = simulate(CALM._replace(save_s=10.0, start_s=400.0), interval=9, seconds=10_400.0, seed=0)
    assert (outcome.steps, outcome.lost, outcome.share) == (900, 0, pytest.approx(900 / 1040))


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (0.0, (0, 0, 10.0)), (9.0, (0, 0, 1.0)), (10.0, (0, 1, 10.0)), (34.0, (0, 3, 6.0)), (42.0, (0, 4, 8.0)),
        (45.0, (4, 4, 10.0)), (56.0, (4, 5, 9.0)),
    ],
)  # fmt: skip
def test_steps_are_lost_until_their_checkpoint_is_whole(seconds: float, found: tuple[int, int, float]) -> None:
    assert worked(seconds, step_s=10.0, save_s=5.0, interval=4) == found


def test_fewer_nodes_share_the_batch_and_the_network_takes_as_long() -> None:
    assert [CALM.step_on(nodes) for nodes in (4, 2, 1)] == [10.0, 18.0, 32.0]


def test_a_seed_gives_the_same_failures_whatever_the_interval_and_another_others() -> None:
    first = simulate(STORMY, interval=20, seconds=30 * DAY_S, seed=1)
    assert first == simulate(STORMY, interval=20, seconds=30 * DAY_S, seed=1)
    assert first != simulate(STORMY, interval=20, seconds=30 * DAY_S, seed=2)
    assert first.failures > 20
    assert 0.5 < first.share < 1.0


@pytest.mark.parametrize(("every", "at"), [(0.0, 1234.0), (900.0, 1800.0), (617.0, 1234.0)])
def test_nodes_that_are_back_are_let_in_at_once_or_at_the_next_time_for_it(every: float, at: float) -> None:
    assert CALM._replace(let_in_s=every).let_in(1234.0) == at


def test_a_single_node_does_nothing_while_it_is_away() -> None:
    alone = CALM._replace(nodes=1, network_s=0.0, mean_s=DAY_S, noticed_s=(0.0, 0.0))
    outcome = simulate(alone, interval=1, seconds=200 * DAY_S, seed=3)
    away_s = outcome.failures * (alone.away_s + alone.step_s / 2)
    assert outcome.share == pytest.approx(1 - away_s / (200 * DAY_S), rel=1e-3)


def test_no_interval_is_much_better_than_the_one_that_young_and_daly_give() -> None:
    best = STORMY.best_interval
    shares = {
        interval: sum(simulate(STORMY, interval=interval, seconds=100 * DAY_S, seed=seed).share for seed in range(5))
        / 5
        for interval in (1, best // 8, best // 2, best, best * 2, best * 8, best * 64)
    }
    assert max(shares.values()) - shares[best] < 0.002
    assert shares[best] > shares[1]
    assert shares[best] > shares[best * 64]
