import pytest
import torch
from jacobians import random, zoo
from torch.testing import assert_close

import mogb
from mogb.aggregators.mgda import MGDA


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([2.0, 0.0], [0.0, 1.0]),  # orthogonal: weights proportional to the other one's squared norm
        ([1.0, 0.0], [5.0, 1.0]),  # the shorter one alone
        ([-4.0, 1.0], [6.0, 1.0]),  # in conflict
    ],
)
def test_two_objectives_match_the_closed_form(first, second):
    # min over t of |t a + (1 - t) b|^2: t = b . (b - a) / |a - b|^2, cut to [0, 1].
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    t = float((b @ (b - a) / (a - b).square().sum()).clamp(0, 1))
    jacobian = torch.stack([a, b])
    assert_close(MGDA().weights(jacobian @ jacobian.mT), torch.tensor([t, 1 - t], dtype=torch.float64))


def test_orthogonal_gradients_are_weighted_by_inverse_squared_norms():
    squares = torch.tensor([1.0, 4.0, 9.0, 0.25], dtype=torch.float64)
    expected = (1 / squares) / (1 / squares).sum()
    assert_close(MGDA().weights(torch.diag(squares)), expected)


@pytest.mark.parametrize("label", zoo())
def test_every_gradient_gains_at_least_the_squared_norm(label):
    jacobian = zoo()[label]
    solution = MGDA().solve(jacobian @ jacobian.mT)
    direction = torch.from_numpy(solution.weights) @ jacobian
    norms = jacobian.norm(dim=1)
    live = norms > 0
    shortfall = (direction.square().sum() - jacobian @ direction)[live] / (norms[live] * norms[live].min())
    if live.all():
        assert shortfall.max() <= 1e-9
        assert solution.residual <= 1e-9
    else:
        assert not direction.any()


def test_no_point_of_the_hull_is_shorter():
    jacobian = random(4, 7, conflict=0.7, spread=1.0)
    shortest = MGDA()(jacobian).norm()
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(20_000, 4, dtype=torch.float64).exponential_(generator=generator)  # uniform, once normalized
    lengths = (draws / draws.sum(dim=1, keepdim=True) @ jacobian).norm(dim=1)
    assert lengths.min() >= shortest


class TestZeroRows:
    jacobian = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])

    def test_a_zero_gradient_makes_the_point_stationary(self):
        solution = MGDA().solve(self.jacobian @ self.jacobian.mT)
        assert solution.weights.tolist() == [0, 1, 0]
        assert "stationary" in solution.note
        assert not MGDA()(self.jacobian).any()

    def test_it_is_left_out_on_request(self):
        agg = MGDA(ignore_zero=True)
        assert agg.solve(self.jacobian @ self.jacobian.mT).left_out == (1,)
        assert_close(agg(self.jacobian), torch.tensor([0.3, 0.9]))


class TestNormalizations:
    # Rows (3, 4) and (-1, 0), losses 2 and 0.5: every quantity by hand.
    jacobian = torch.tensor([[3.0, 4.0], [-1.0, 0.0]], dtype=torch.float64)
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64)

    def hand(self, divisors, raw):
        scaled = self.jacobian / torch.tensor(divisors, dtype=torch.float64)[:, None]
        a, b = scaled
        t = float((b @ (b - a) / (a - b).square().sum()).clamp(0, 1))
        weights = torch.tensor([t, 1 - t], dtype=torch.float64)
        return weights @ (self.jacobian if raw else scaled)

    @pytest.mark.parametrize("raw", [False, True])
    @pytest.mark.parametrize(
        ("kind", "divisors"), [("none", [1, 1]), ("l2", [5, 1]), ("loss", [2, 0.5]), ("loss+", [10, 0.5])]
    )
    def test_each_divides_by_its_own_number(self, kind, divisors, raw):
        agg = MGDA(normalization=kind, apply_to="raw" if raw else "normalized")
        direction = agg(self.jacobian, self.losses if agg.reads == "gramian+losses" else None)
        assert_close(direction, self.hand(divisors, raw))

    def test_two_unit_gradients_share_their_sum(self):
        # The shortest vector between two unit vectors is half their sum.
        direction = MGDA(normalization="l2")(self.jacobian)
        assert_close(direction, torch.tensor([(0.6 - 1) / 2, 0.4], dtype=torch.float64))

    def test_only_weights_on_normalized_gradients_never_conflict(self):
        jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
        losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
        raw = MGDA(normalization="loss", apply_to="raw")
        assert (jacobian @ raw(jacobian, losses)).min() < -1
        assert mogb.Promise.NON_CONFLICTING not in raw.keeps
        normalized = MGDA(normalization="loss")
        assert (jacobian @ normalized(jacobian, losses)).min() > 0
        assert mogb.Promise.NON_CONFLICTING in normalized.keeps

    def test_only_the_kinds_with_losses_read_them(self):
        reads = {kind: MGDA(normalization=kind).reads for kind in ("none", "l2", "loss", "loss+")}
        assert reads == {"none": "gramian", "l2": "gramian", "loss": "gramian+losses", "loss+": "gramian+losses"}

    def test_losses_must_be_positive(self):
        agg = MGDA(normalization="loss")
        for bad in (0.0, -1.0):
            with pytest.raises(ValueError, match=r"losses\[1\] = .* Shift the loss"):
                agg(self.jacobian, torch.tensor([1.0, bad], dtype=torch.float64))


def test_float32_gradients_of_a_real_size_conflict_with_nothing():
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(16, 40_000, generator=generator)
    jacobian -= 0.99 * jacobian.mean(dim=0)
    jacobian *= torch.logspace(-3, 3, 16)[:, None]
    direction = MGDA()(jacobian).double()
    exact = jacobian.double()
    norms = exact.norm(dim=1)
    rounding = torch.finfo(torch.float32).eps * float(MGDA().weights(exact @ exact.mT) @ norms)
    assert (exact @ direction / norms).min() > -rounding
    assert direction.norm() > 100 * rounding
