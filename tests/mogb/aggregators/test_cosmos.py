import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from mogb.aggregators.cosmos import COSMOS


@pytest.mark.parametrize("ideal", [None, [0.5, -0.5, 0.25]])
@pytest.mark.parametrize("penalty", [0.0, 0.01, 8.0])
def test_the_weights_are_the_derivatives_of_torch_s_cosine(penalty, ideal):
    losses = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64, requires_grad=True)
    preference = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    point = losses - torch.tensor(ideal or [0.0, 0.0, 0.0], dtype=torch.float64)
    value = (preference * point).sum() - penalty * cosine_similarity(preference, point, dim=0)
    value.backward()
    solution = COSMOS(penalty=penalty, preference=[1.0, 1.0, 2.0], ideal=ideal).solve(losses=losses)
    assert_close(torch.from_numpy(solution.weights), losses.grad)
    assert solution.value == pytest.approx(value.item())


def test_in_the_preferred_ratio_the_cosine_has_no_slope():
    preference = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert_close(COSMOS(preference=[1.0, 3.0]).weights(losses=2 * preference), preference, atol=1e-15, rtol=0)


def test_at_the_ideal_point_the_weighted_sum_is_left():
    solution = COSMOS(ideal=[1.0, 2.0]).solve(losses=torch.tensor([1.0, 2.0]))
    assert solution.weights.tolist() == [0.5, 0.5]
    assert "ideal point" in solution.note


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        COSMOS(penalty=-1.0)
