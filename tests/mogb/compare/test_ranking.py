import numpy as np
import pytest

from mogb.compare.ranking import rank


def test_ranks_wins_and_order_by_hand():
    # Units of p: a wins twice, then b; c is always last. Units of q: a and b tie, c failed.
    found = rank(
        ["c", "b", "a"],
        {
            "p": np.array([[9.0, 9.0, 9.0], [2.0, 2.0, 1.0], [1.0, 1.0, 2.0]]),
            "q": np.array([[np.inf], [5.0], [5.0]]),
        },
    )
    np.testing.assert_allclose(found.ranks, [[3, 3], [5 / 3, 1.5], [4 / 3, 1.5]])
    np.testing.assert_allclose(found.overall, [3, 19 / 12, 17 / 12])
    assert [found.methods[i] for i in found.order] == ["a", "b", "c"]
    np.testing.assert_allclose(found.wins[2], [1, (2 / 3 + 0.5) / 2, 0.5])
    np.testing.assert_allclose(found.wins + found.wins.T, 1)
    assert found.units == (3, 1)


def test_an_interval_covers_the_mean_and_is_a_point_where_units_agree():
    scores = np.array([[1.0, 1, 2, 1, 1, 2, 1, 1], [2.0, 2, 1, 2, 2, 1, 2, 2], [3.0] * 8])
    found = rank(["a", "b", "c"], {"p": scores})
    assert (found.low <= found.ranks).all()
    assert (found.ranks <= found.high).all()
    assert found.low[0, 0] < 1.25 < found.high[0, 0]
    assert found.low[2, 0] == found.high[2, 0] == 3


def test_a_bootstrap_interval_is_about_two_standard_errors():
    generator = np.random.default_rng(0)
    first = generator.random(400)
    found = rank(["a", "b"], {"p": np.stack([first, np.full(400, 0.5)])})
    error = np.std(first > 0.5) / np.sqrt(400)  # of the share in which b is better: ranks are 1 + that share
    assert found.high[0, 0] - found.low[0, 0] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_same_scores_give_the_same_intervals():
    scores = {"p": np.random.default_rng(1).random((4, 9)), "q": np.random.default_rng(2).random((4, 5))}
    first, second = rank(list("abcd"), scores), rank(list("abcd"), scores)
    np.testing.assert_array_equal(first.overall_low, second.overall_low)
    np.testing.assert_array_equal(first.high, second.high)


def test_nothing_to_rank_is_none():
    assert rank(["a"], {}) is None
