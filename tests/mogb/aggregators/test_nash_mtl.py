import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.nash_mtl import NashMTL


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_it_is_the_fixed_point(size, spread):
    jacobian = random(size, 200, conflict=0.7, spread=spread)
    gramian = jacobian @ jacobian.mT
    weights = NashMTL(max_norm=0.0).weights(gramian)
    assert weights.min() > 0
    assert_close((gramian @ weights) * weights, torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-8)


def test_the_squared_norm_is_the_number_of_objectives():
    assert_close(NashMTL(max_norm=0.0)(random(5, 20)).square().sum(), torch.tensor(5.0, dtype=torch.float64))


def test_two_objectives_go_along_the_sum_of_the_unit_gradients():
    jacobian = random(2, 6, spread=3.0)
    along = (jacobian / jacobian.norm(dim=1, keepdim=True)).sum(dim=0)
    direction = NashMTL(max_norm=0.0)(jacobian)
    assert_close(direction, along / along.norm() * 2**0.5)


def test_no_direction_of_that_length_has_a_larger_product_of_gains():
    jacobian = random(3, 4, conflict=0.6, spread=1.0)
    direction = NashMTL(max_norm=1.0)(jacobian)
    generator = torch.Generator().manual_seed(0)
    others = torch.nn.functional.normalize(torch.randn(20_000, 4, dtype=torch.float64, generator=generator))
    gains = others @ jacobian.mT
    assert_close(direction.norm(), torch.tensor(1.0, dtype=torch.float64))
    best = gains[(gains > 0).all(dim=1)].log().sum(dim=1).max()
    assert (jacobian @ direction).log().sum() >= best


class TestClip:
    jacobian = random(4, 9)

    def test_the_direction_is_at_most_max_norm_long(self):
        raw = NashMTL(max_norm=0.0)(self.jacobian)
        assert_close(raw.norm(), torch.tensor(2.0, dtype=torch.float64))
        assert_close(NashMTL()(self.jacobian), raw / 2)
        assert_close(NashMTL(max_norm=1.5)(self.jacobian), raw * 0.75)
        assert_close(NashMTL(max_norm=3.0)(self.jacobian), raw)

    @pytest.mark.parametrize("bad", [-1.0, float("nan")])
    def test_impossible_norms_are_refused(self, bad):
        with pytest.raises(ValueError, match="max_norm must be positive, or 0"):
            NashMTL(max_norm=bad)


class TestStationary:
    @pytest.mark.parametrize(
        "jacobian",
        [[[1.0, 1.0], [-1.0, -1.0]], [[1.0, 2.0], [-3.0, -6.0]], [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]],
    )
    def test_where_no_bargain_exists_the_direction_is_zero_and_flagged(self, jacobian):
        jacobian = torch.tensor(jacobian, dtype=torch.float64)
        solution = NashMTL().solve(jacobian @ jacobian.mT)
        assert "stationary" in solution.note
        assert not solution.weights.any()
        assert not NashMTL()(jacobian).any()

    def test_an_ordinary_answer_has_no_note(self):
        assert NashMTL().solve(torch.eye(3)).note == ""


def test_the_example_on_which_the_official_solver_gives_the_plain_sum():
    jacobian = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-1.0, -1.0, 3.0]], dtype=torch.float64)
    expected = torch.tensor([0.806, 0.806, 1.304], dtype=torch.float64)
    assert_close(NashMTL(max_norm=0.0)(jacobian), expected, rtol=0, atol=1e-3)


def test_preferences_are_bargaining_powers():
    # Orthogonal gradients: |g|^2 w = p / w, with p scaled to mean 1.
    jacobian = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    preference = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    weights = NashMTL(max_norm=0.0, preference=(3.0, 2.0, 1.0)).weights(jacobian @ jacobian.mT)
    assert_close(weights, (preference / 2).sqrt() / jacobian.diagonal())


def test_equal_preferences_change_nothing():
    gramian = random(5, 30, conflict=0.5) @ random(5, 30, conflict=0.5).mT
    assert_close(NashMTL(preference=[2.0] * 5).weights(gramian), NashMTL().weights(gramian), rtol=1e-10, atol=0)


def test_preferences_keep_their_place_when_a_zero_gradient_is_left_out():
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.3, 2.0]], dtype=torch.float64)
    found = NashMTL(max_norm=0.0, preference=[1.0, 5.0, 3.0]).solve(jacobian @ jacobian.mT)
    live = jacobian[[0, 2]]
    expected = NashMTL(max_norm=0.0, preference=[1.0, 3.0]).weights(live @ live.mT)
    assert_close(torch.from_numpy(found.weights)[[0, 2]], expected)
    assert found.left_out == (1,)


@pytest.mark.usefixtures("unchecked")
def test_impossible_preferences_are_refused():
    with pytest.raises(ValueError, match="positive numbers"):
        NashMTL(preference=[1.0, 0.0])
    with pytest.raises(ValueError, match="one number per objective, 3, but has 2"):
        NashMTL(preference=[1.0, 1.0])(torch.eye(3))
