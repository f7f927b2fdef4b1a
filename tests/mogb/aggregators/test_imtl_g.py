import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.imtl_g import IMTLG


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_the_projections_onto_all_unit_gradients_are_equal(size):
    jacobian = random(size, 20, spread=3.0)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    direction = IMTLG()(jacobian)
    projections = units @ direction
    assert_close(projections, projections.mean().expand(size), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_weights_sum_to_one(size):
    jacobian = random(size, 20)
    assert_close(IMTLG().weights(jacobian @ jacobian.mT).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_system_of_the_paper_gives_the_same_weights():
    # Equation 3: alpha_{2..K} = g_1 U^T (D U^T)^{-1} with D = g_1 - g_k and U = u_1 - u_k.
    jacobian = random(4, 10, conflict=0.3, spread=1.0)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    differences, u = jacobian[:1] - jacobian[1:], units[:1] - units[1:]
    alpha = jacobian[0] @ u.mT @ torch.linalg.inv(differences @ u.mT)
    expected = torch.cat([1 - alpha.sum().reshape(1), alpha])
    assert_close(IMTLG().weights(jacobian @ jacobian.mT), expected)


def test_two_objectives_are_weighted_by_the_norm_of_the_other():
    for cosine in (0.9, 0.0, -0.9, -1.0, 1.0):
        gramian = torch.tensor([[4.0, 6.0 * cosine], [6.0 * cosine, 9.0]], dtype=torch.float64)
        assert_close(IMTLG().weights(gramian), torch.tensor([0.6, 0.4], dtype=torch.float64))


def test_parallel_gradients_share_a_weight_where_the_official_system_is_singular():
    jacobian = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    projections = units @ IMTLG()(jacobian)
    assert_close(projections, projections[:1].expand(3))


def test_a_step_against_every_gradient_is_announced():
    # v = C^{-1} 1 has a negative entry, and the gradient behind it is by far the shortest.
    units = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9]], dtype=torch.float64)
    jacobian = torch.cat([units, torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    jacobian[2, 2] = 0.05
    cosines = torch.nn.functional.normalize(jacobian) @ torch.nn.functional.normalize(jacobian).mT
    v = torch.linalg.solve(cosines, torch.ones(3, dtype=torch.float64))
    assert v.min() < 0
    shrunk = jacobian * torch.where(v < 0, 1e-3, 1.0)[:, None]
    solution = IMTLG().solve(shrunk @ shrunk.mT)
    assert "against every gradient" in solution.note
    direction = torch.from_numpy(solution.weights) @ shrunk
    assert (shrunk @ direction).max() < 0


def test_where_no_direction_projects_alike_it_is_zero():
    # Three unit vectors at 120 degrees, and their opposites' sum is zero: 1 is orthogonal to the range of C.
    jacobian = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], dtype=torch.float64)
    solution = IMTLG().solve(jacobian @ jacobian.mT)
    assert abs(torch.from_numpy(solution.weights) @ jacobian).max() < 1e-12
