import numpy as np
import pytest
import torch
from jacobians import random, zoo
from scipy.optimize import nnls
from torch.testing import assert_close

import mogb
from mogb.aggregators.upgrad import UPGrad


def projected(jacobian, vector):
    """The closest point of {d : J d >= 0}: its polar cone is spanned by -J, a problem of non-negative least squares."""
    multipliers, _ = nnls(-jacobian.numpy().T, vector.numpy())
    return vector + torch.from_numpy(multipliers) @ jacobian


@pytest.mark.parametrize(
    "label", ["two rows", "random 5 in conflict", "random 8 in conflict", "more rows than columns"]
)
def test_it_sums_the_projections_of_the_gradients(label):
    jacobian = zoo()[label]
    expected = torch.stack([projected(jacobian, row) for row in jacobian]).mean(dim=0)
    assert_close(UPGrad()(jacobian), expected, rtol=1e-8, atol=1e-10)


def test_two_gradients_by_hand():
    # (1, 0) onto d . (-1, 1) >= 0 is (1/2, 1/2); (-1, 1) onto d . (1, 0) >= 0 is (0, 1); the mean of the two.
    assert_close(UPGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])), torch.tensor([0.25, 0.75]))


def test_the_example_on_which_a_ridge_conflicts():
    # Published value: (2/29, 295/29), while the ridge of TorchJD gives (-5.55, 10.17).
    direction = UPGrad()(torch.tensor([[1.0, 0.0], [-50.0, 20.0]], dtype=torch.float64))
    assert_close(direction, torch.tensor([2 / 29, 295 / 29], dtype=torch.float64))


def test_without_conflict_it_is_the_mean():
    jacobian = random(5, 8).abs()
    assert_close(UPGrad()(jacobian), jacobian.mean(dim=0))


def test_a_preference_weights_the_projections():
    jacobian = random(4, 6, conflict=0.9)
    preference = [0.1, 0.0, 2.0, 0.5]
    expected = sum(p * projected(jacobian, row) for p, row in zip(preference, jacobian, strict=True))
    assert_close(UPGrad(preference=preference)(jacobian), expected, rtol=1e-8, atol=1e-10)
    assert mogb.Promise.PERMUTATION_EQUIVARIANT not in UPGrad(preference=preference).keeps


def test_quadprog_is_a_second_opinion():
    pytest.importorskip("quadprog")
    jacobian = random(6, 20, conflict=0.9, spread=4.0)
    gramian = jacobian @ jacobian.mT
    assert_close(UPGrad(solver="quadprog").weights(gramian), UPGrad().weights(gramian), rtol=1e-6, atol=0)


def test_a_missing_quadprog_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mogb\[quadprog\]"):
        UPGrad(solver="quadprog")


def test_many_objectives_with_a_spread_of_norms_conflict_with_none():
    jacobian = random(48, 100, conflict=0.95, spread=6.0)
    direction = UPGrad()(jacobian)
    cosines = (jacobian @ direction / jacobian.norm(dim=1) / direction.norm()).numpy()
    assert np.min(cosines) > -1e-9
