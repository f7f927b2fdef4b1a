import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.graddrop import GradDrop
from mogb.jacobian import Jacobian


def published(jacobian, luck, leak=None):
    """The masks of the paper, coordinate by coordinate."""
    purity = 0.5 * (1 + jacobian.sum(dim=0) / jacobian.abs().sum(dim=0).clamp(min=1e-300))
    masks = ((purity > luck) & (jacobian > 0)) | ((purity <= luck) & (jacobian < 0))
    leak = torch.zeros(len(jacobian), dtype=jacobian.dtype) if leak is None else leak
    return ((leak[:, None] + (1 - leak[:, None]) * masks) * jacobian).sum(dim=0)


def draws(seed, length):
    return torch.rand(length, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_keeps_the_drawn_sign_of_every_coordinate(size):
    jacobian = random(size, 400)
    assert_close(GradDrop(seed=3)(jacobian), published(jacobian, draws(3, 400)))


def test_coordinates_of_one_sign_are_summed():
    jacobian = random(3, 50).abs()
    assert_close(GradDrop()(jacobian), jacobian.sum(dim=0))
    assert_close(GradDrop()(-jacobian), -jacobian.sum(dim=0))


def test_it_draws_the_positive_sign_with_probability_p_over_p_plus_q():
    jacobian = torch.tensor([[3.0], [-1.0]]).expand(2, 100_000).contiguous()
    direction = GradDrop(seed=1)(jacobian)
    assert set(direction.unique().tolist()) == {-1.0, 3.0}
    share = float((direction > 0).double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 100_000) ** 0.5


def test_steps_draw_anew():
    agg, jacobian = GradDrop(), random(2, 40)
    assert not torch.equal(agg(jacobian), agg(jacobian))


@pytest.mark.parametrize("leak", [1.0, 0.3, [0.0, 0.5, 1.0]])
def test_leak_lets_a_share_of_the_gradients_pass(leak):
    jacobian = random(3, 200)
    per_row = torch.tensor(leak, dtype=torch.float64).expand(3)
    assert_close(GradDrop(seed=2, leak=leak)(jacobian), published(jacobian, draws(2, 200), per_row))


def test_a_leak_of_one_is_the_sum():
    jacobian = random(3, 20)
    assert_close(GradDrop(leak=1.0)(jacobian), jacobian.sum(dim=0))


def test_long_rows_are_worked_off_in_parts():
    jacobian = random(4, 300_000).float()
    expected = published(jacobian.double(), draws(0, 300_000)).float()
    assert_close(GradDrop()(jacobian), expected)


def test_blocks_keep_their_shapes():
    blocks = (torch.randn(2, 3, 4), torch.randn(2, 5))
    parts, gramian, solution = GradDrop().direct(Jacobian(blocks), None)
    assert [part.shape for part in parts] == [(3, 4), (5,)]
    assert gramian is None
    assert solution is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), [0.5, 2.0], []])
def test_impossible_leaks_are_refused(bad):
    with pytest.raises(ValueError, match=r"leak must be in \[0, 1\]"):
        GradDrop(leak=bad)


def test_leaks_of_another_number_are_refused():
    with pytest.raises(ValueError, match="one number per objective, 3, but has 2"):
        GradDrop(leak=[0.1, 0.2])(torch.eye(3))
