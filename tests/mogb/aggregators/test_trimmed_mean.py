import pytest
import torch
from scipy.stats import trim_mean
from torch.testing import assert_close

import mogb
from mogb.aggregators.trimmed_mean import TrimmedMean
from mogb.jacobian import CHUNK_WIDE, Jacobian


def random(size, length, seed=0):
    return torch.randn(size, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "trim"), [(3, 0), (3, 1), (7, 2), (10, 4)])
def test_it_is_scipy_s_trimmed_mean(size, trim):
    jacobian = random(size, 50)
    expected = trim_mean(jacobian.numpy(), (trim + 1e-9) / size, axis=0)
    assert_close(TrimmedMean(trim=trim)(jacobian), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_without_a_number_it_is_the_median(size):
    jacobian = random(size, 30)
    assert_close(TrimmedMean()(jacobian), jacobian.quantile(0.5, dim=0))


def test_wrong_gradients_have_no_influence_beyond_the_right_ones():
    right = random(5, 40)
    wrong = torch.full((2, 40), 1e30, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]])
    direction = TrimmedMean(trim=2)(torch.cat([right, wrong]))
    assert (direction >= right.min(0).values).all()
    assert (direction <= right.max(0).values).all()


def test_blocks_and_slices_are_coordinates_like_others():
    jacobian = random(3, CHUNK_WIDE // 3 + 10)
    whole = TrimmedMean()(jacobian)
    assert_close(whole, jacobian.median(0).values)
    parts, _, _ = TrimmedMean().direct(Jacobian((jacobian[:, :6].reshape(3, 2, 3), jacobian[:, 6:])), None)
    assert torch.equal(torch.cat([parts[0].reshape(-1), parts[1]]), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_trimmed_away(bad):
    jacobian = random(5, 8)
    jacobian[3, 2] = bad
    with pytest.raises(mogb.NonFiniteError, match="objective 3"):
        TrimmedMean()(jacobian)


def test_half_precision_is_averaged_in_float32():
    rows = torch.tensor([[60000.0], [60000.0], [50000.0]], dtype=torch.float16)  # their sum overflows float16
    assert TrimmedMean(trim=0)(rows).item() == pytest.approx(56667, rel=1e-3)


def test_too_few_gradients_are_refused():
    with pytest.raises(ValueError, match="trim=2 needs at least 5 gradients, but got 4"):
        TrimmedMean(trim=2)(random(4, 3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("trim", [-1, 0.5, True])
def test_impossible_options_are_refused(trim):
    with pytest.raises(ValueError, match="trim must be a whole number"):
        TrimmedMean(trim=trim)
