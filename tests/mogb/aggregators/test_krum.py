"""Krum: scores from distances in the open, ties, and the counts that it needs."""

import numpy as np
import pytest
import torch

from mogb.aggregators.krum import Krum

GENERATOR = np.random.default_rng(0)


def scores_by_hand(rows, neighbours, power):
    scores = []
    for i, row in enumerate(rows):
        others = sorted(np.linalg.norm(row - other) ** power for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[:neighbours]))
    return np.array(scores)


@pytest.mark.parametrize(("distance", "power"), [("squared", 2), ("euclidean", 1)])
@pytest.mark.parametrize(("size", "byzantine", "selected"), [(3, 0, 1), (5, 1, 1), (7, 2, 3), (9, 3, 6)])
def test_it_averages_the_rows_of_the_lowest_score(distance, power, size, byzantine, selected):
    rows = GENERATOR.normal(size=(size, 6)) * GENERATOR.uniform(0.1, 3.0, size)[:, None]
    scores = scores_by_hand(rows, size - byzantine - 2, power)
    best = np.lexsort((np.arange(size), scores.round(12)))[:selected]
    method = Krum(num_byzantine=byzantine, num_selected=selected, distance=distance)
    direction = method(torch.from_numpy(rows))
    np.testing.assert_allclose(direction.numpy(), rows[best].mean(axis=0), atol=1e-12)
    solution = method.solve(torch.from_numpy(rows @ rows.T))
    np.testing.assert_allclose(solution.details["scores"], scores, rtol=1e-10)
    assert solution.left_out == tuple(i for i in range(size) if i not in best)


def test_squared_and_plain_distances_differ():
    # Row 0 has its two neighbours at 1 and 7, row 3 at 5 and 5: 50 = 50 squared would tie, so shift one a little.
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-7.0, 0.0], [0.0, 100.0], [3.0, 100.0], [-5.0, 100.0]]).double()
    squared = Krum(num_byzantine=2).solve(rows @ rows.T).details["scores"]
    plain = Krum(num_byzantine=2, distance="euclidean").solve(rows @ rows.T).details["scores"]
    np.testing.assert_allclose(squared[[0, 3]], [1 + 49, 9 + 25])
    np.testing.assert_allclose(plain[[0, 3]], [1 + 7, 3 + 5])


def test_a_wrong_gradient_is_not_chosen_however_long_it_is():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[2] *= 1e9
    assert Krum(num_byzantine=1, num_selected=3).weights(rows @ rows.T)[2] == 0


def test_ties_go_to_the_first():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [9.0, 0.0]])  # rows 0 and 1 are each other's neighbours
    assert Krum()(rows).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("size", [1, 2])
def test_too_few_to_compare_are_averaged_if_none_is_suspected(size):
    assert Krum().weights(torch.eye(size)).tolist() == [1 / size] * size


def test_refusals():
    with pytest.raises(ValueError, match=r"num_byzantine=2 needs at least 5 gradients, but got 4"):
        Krum(num_byzantine=2).weights(torch.eye(4))
    with pytest.raises(ValueError, match=r"num_selected=4 got only 3"):
        Krum(num_selected=4).weights(torch.eye(3))
    for options in ({"num_byzantine": -1}, {"num_selected": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Krum(**options)
    method = Krum()
    object.__setattr__(method, "distance", "cosine")
    with pytest.raises(ValueError, match="distance must be 'squared' or 'euclidean', but got 'cosine'"):
        method._check()
