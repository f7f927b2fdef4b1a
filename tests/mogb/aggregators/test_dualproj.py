import pytest
import torch
from jacobians import random, zoo
from scipy.optimize import nnls
from torch.testing import assert_close

from mogb.aggregators.dualproj import DualProj


def projected(jacobian, vector):
    multipliers, _ = nnls(-jacobian.numpy().T, vector.numpy())
    return vector + torch.from_numpy(multipliers) @ jacobian


@pytest.mark.parametrize(
    "label", ["two rows", "random 5 in conflict", "random 8 in conflict", "more rows than columns"]
)
def test_it_projects_the_mean_gradient(label):
    jacobian = zoo()[label]
    assert_close(DualProj()(jacobian), projected(jacobian, jacobian.mean(dim=0)), rtol=1e-8, atol=1e-10)


def test_the_result_lies_on_the_face_of_the_gradient_that_was_in_conflict():
    jacobian = torch.tensor([[1.0, 0.0], [-3.0, 2.0]])
    direction = DualProj()(jacobian)  # the mean (-1, 1) conflicts with (1, 0) only
    assert_close(direction, torch.tensor([0.0, 1.0]))
    assert float(jacobian[0] @ direction) == 0


def test_it_is_episodic_memory_with_the_preference_of_the_newest_task():
    # GEM projects the new gradient so that no remembered one is violated.
    jacobian = random(3, 5, conflict=0.9)
    assert_close(
        DualProj(preference=[0.0, 0.0, 1.0])(jacobian), projected(jacobian, jacobian[2]), rtol=1e-8, atol=1e-10
    )


def test_nothing_closer_to_the_mean_is_free_of_conflict():
    jacobian = torch.tensor([[1.0, 0.0, 0.2], [-3.0, 2.0, 0.0], [0.0, -1.0, 1.5]], dtype=torch.float64)
    mean, direction = jacobian.mean(dim=0), DualProj()(jacobian)
    generator = torch.Generator().manual_seed(0)
    candidates = direction + 0.5 * torch.randn(5000, 3, dtype=torch.float64, generator=generator)
    allowed = candidates[(candidates @ jacobian.mT >= 0).all(dim=1)]
    assert len(allowed) > 100
    assert ((allowed - mean).norm(dim=1) >= (direction - mean).norm()).all()


def test_quadprog_is_a_second_opinion():
    pytest.importorskip("quadprog")
    jacobian = random(6, 20, conflict=0.9, spread=4.0)
    gramian = jacobian @ jacobian.mT
    assert_close(DualProj(solver="quadprog").weights(gramian), DualProj().weights(gramian), rtol=1e-6, atol=0)
