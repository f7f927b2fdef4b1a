import pytest
import torch
from jacobians import random
from torch.testing import assert_close

from mogb.aggregators.aligned_mtl import AlignedMTL


def aligned(jacobian, scale_mode):
    """The definition on the singular values of the Jacobian: U sigma V^T with all singular values equal."""
    u, values, vh = torch.linalg.svd(jacobian, full_matrices=False)
    common = {
        "min": values.min(),
        "median": values.square().median().sqrt(),
        "rmse": values.square().mean().sqrt(),
    }[scale_mode]
    return common * u @ vh


@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_it_sums_the_rows_of_the_polar_factor(size, scale_mode):
    jacobian = random(size, 12, spread=1.0)
    direction = AlignedMTL(scale_mode=scale_mode)(jacobian)
    assert_close(direction, aligned(jacobian, scale_mode).sum(dim=0))
    assert_close(AlignedMTL(scale_mode=scale_mode, reduction="mean")(jacobian), direction / size)


def test_orthogonal_gradients_all_get_the_shortest_length():
    direction = AlignedMTL()(torch.diag(torch.tensor([5.0, 2.0, 3.0])))
    assert_close(direction, torch.tensor([2.0, 2.0, 2.0]))


def test_of_two_eigenvalues_in_the_middle_the_lower_one_counts():
    # Squared lengths 1, 4, 9, 16: the lower median is 4.
    direction = AlignedMTL(scale_mode="median")(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert_close(direction, torch.full((4,), 2.0))


def test_a_preference_weights_the_aligned_gradients():
    jacobian = random(3, 8)
    preference = [0.2, 0.3, 0.5]
    expected = torch.tensor(preference, dtype=torch.float64) @ aligned(jacobian, "min")
    assert_close(AlignedMTL(preference=preference)(jacobian), expected)


class TestRank:
    def test_duplicate_gradients_do_not_shrink_the_direction(self):
        # Rows (2, 0), (2, 0), (0, 1): the eigenvalues are 8, 1 and a zero that takes no part.
        jacobian = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        assert_close(AlignedMTL()(jacobian), torch.tensor([2**0.5, 1.0]))

    def test_the_tolerance_decides_what_counts_as_zero(self):
        jacobian = torch.diag(torch.tensor([1.0, 1e-4], dtype=torch.float64))  # eigenvalues 1 and 1e-8
        assert_close(AlignedMTL()(jacobian), torch.tensor([1.0, 0.0], dtype=torch.float64))
        assert_close(AlignedMTL(rank_tolerance=1e-12)(jacobian), torch.tensor([1e-4, 1e-4], dtype=torch.float64))

    def test_noise_of_float32_rows_takes_no_part(self):
        generator = torch.Generator().manual_seed(0)
        jacobian = torch.randn(2, 50, generator=generator)
        jacobian = torch.cat([jacobian, jacobian.sum(dim=0, keepdim=True) / 3])  # dependent up to rounding
        values = torch.linalg.eigvalsh(jacobian.double() @ jacobian.double().mT)
        direction = AlignedMTL()(jacobian)
        assert direction.norm() > 0.5 * values[1].sqrt()


@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="leave reduction at 'sum'"):
        AlignedMTL(preference=[1.0, 1.0], reduction="mean")
    with pytest.raises(ValueError, match="rank_tolerance"):
        AlignedMTL(rank_tolerance=1.0)
    with pytest.raises(ValueError, match="not all zero"):
        AlignedMTL(preference=[0.0, 0.0])
    with pytest.raises(ValueError, match="non-negative"):
        AlignedMTL(preference=[1.0, -1.0])
    with pytest.raises(TypeError, match="sequence of numbers"):
        AlignedMTL(preference=3)
    with pytest.raises(ValueError, match="one number per objective, 3, but has 2"):
        AlignedMTL(preference=[1.0, 1.0])(torch.eye(3))
