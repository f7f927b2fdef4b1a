import pytest
import torch
from jacobians import random, zoo
from torch.testing import assert_close

from mogb.aggregators.cagrad import CAGrad


def dual(jacobian, weights, c):
    mean = jacobian.mean(dim=0)
    combined = weights @ jacobian
    return combined @ mean + c * mean.norm() * combined.norm(dim=-1)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("label", ["two rows", "random 3", "random 5 in conflict", "spread of 1e6", "tiny", "huge"])
def test_primal_and_dual_meet(label, c):
    # Weak duality: min_k g_k . d <= F(w) for every d in the trust region and w on the simplex. Equality proves both.
    jacobian = zoo()[label]
    agg = CAGrad(c=c, rescale=0)
    direction = agg(jacobian)
    weights = torch.from_numpy(agg.solve(jacobian @ jacobian.mT).details["simplex"])
    mean = jacobian.mean(dim=0)
    assert weights.min() >= 0
    assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (direction - mean).norm() <= c * mean.norm() * (1 + 1e-9)
    worst, bound = float((jacobian @ direction).min()), float(dual(jacobian, weights, c))
    scale = float(jacobian.norm(dim=1).max() * mean.norm())
    assert abs(bound - worst) <= 1e-8 * scale


def test_it_differs_from_the_mean_however_short_the_gradients_are():
    # The official solver stops at its start below a mean norm of about 0.04, and is then the mean gradient.
    jacobian = random(3, 20, conflict=0.9)
    direction = CAGrad(c=0.4, rescale=0)(jacobian)
    for scale in (1e-3, 1e-9, 1e9):
        assert_close(CAGrad(c=0.4, rescale=0)(scale * jacobian) / scale, direction)
    mean = jacobian.mean(dim=0)
    assert (direction - mean).norm() > 0.39 * mean.norm()


def test_equal_gradients_are_only_lengthened():
    # g_w = g_0: d = (1 + c) g_0.
    jacobian = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert_close(CAGrad(c=0.3, rescale=0)(jacobian), torch.tensor([1.3, 2.6]))


def test_c_zero_is_the_mean_gradient():
    jacobian = random(4, 6)
    for rescale in (0, 1, 2):
        assert_close(CAGrad(c=0.0, rescale=rescale)(jacobian), jacobian.mean(dim=0))


def test_rescale_divides_as_the_official_function():
    jacobian = random(3, 8, conflict=0.5)
    plain = CAGrad(c=0.5, rescale=0)(jacobian)
    assert_close(CAGrad(c=0.5)(jacobian), plain / 1.25)
    assert_close(CAGrad(c=0.5, rescale=2)(jacobian), plain / 1.5)


def test_with_c_of_one_or_more_no_objective_gets_worse():
    for seed in range(10):
        jacobian = random(4, 6, seed=seed, conflict=0.9, spread=1.0)
        products = jacobian @ CAGrad(c=1.0)(jacobian)
        assert products.min() >= -1e-9 * float(jacobian.norm(dim=1).max()) ** 2


class TestStationary:
    @pytest.mark.parametrize(
        "jacobian",
        [
            [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]],  # a zero gradient
            [[1.0, 2.0], [0.5, -0.2], [0.0, 0.0]],
            [[1.0, 1.0], [-1.0, -1.0]],  # the mean is zero as well
        ],
    )
    def test_it_is_the_mean_gradient_itself_and_flagged(self, jacobian):
        jacobian = torch.tensor(jacobian, dtype=torch.float64)
        for rescale in (0, 1, 2):
            agg = CAGrad(c=0.5, rescale=rescale)
            assert_close(agg(jacobian), jacobian.mean(dim=0))
            assert "stationary" in agg.solve(jacobian @ jacobian.mT).note

    def test_zero_in_the_hull_is_not_enough(self):
        # g_0 = (-1, -1). With w = (1, 0) the dual is -2 + 0.5 * 2 < 0, the value at g_w = 0: d = g_0 + g_1 / 2.
        jacobian = torch.tensor([[1.0, 1.0], [-3.0, -3.0]], dtype=torch.float64)
        assert_close(CAGrad(c=0.5, rescale=0)(jacobian), torch.tensor([-0.5, -0.5], dtype=torch.float64))

    def test_an_ordinary_answer_has_no_note(self):
        assert CAGrad().solve(torch.eye(3)).note == ""


@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_refused():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="c must be 0 or a positive number"):
            CAGrad(c=bad)
    with pytest.raises(ValueError, match="rescale must be 0"):
        CAGrad(rescale=3)


class TestPreference:
    def test_without_a_radius_it_is_the_preferred_gradient(self):
        jacobian = random(3, 6, seed=1)
        expected = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) @ jacobian
        assert_close(CAGrad(c=0.0, rescale=0, preference=[2.0, 1.0, 1.0])(jacobian), expected)

    def test_no_direction_as_near_to_it_improves_the_worst_more(self):
        jacobian, c = random(3, 4, seed=2, conflict=0.6), 0.4
        preferred = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64) @ jacobian
        direction = CAGrad(c=c, rescale=0, preference=[6.0, 3.0, 1.0])(jacobian)
        assert_close((direction - preferred).norm(), c * preferred.norm())
        generator = torch.Generator().manual_seed(0)
        away = torch.randn(20_000, 4, dtype=torch.float64, generator=generator)
        others = preferred + c * preferred.norm() * torch.nn.functional.normalize(away)
        assert (jacobian @ direction).min() >= (others @ jacobian.mT).min(dim=1).values.max()

    def test_where_nothing_improves_it_is_the_preferred_gradient(self):
        jacobian = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        agg = CAGrad(preference=[1.0, 1.0])
        assert "preferred" in agg.solve(jacobian @ jacobian.mT).note
