"""Pareto MTL: its two small problems by hand and by conditions, its phases, where a run with it ends."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.aggregators.pareto_mtl import ParetoMTL
from mogb.base import Promise


def quarter_circle(count):
    angles = np.linspace(0, np.pi / 2, count)
    return np.column_stack([np.cos(angles), np.sin(angles)]).tolist()


def violated(references, index, losses):
    units = np.array(references) / np.linalg.norm(references, axis=1, keepdims=True)
    rows = units - units[index]
    return rows[rows @ losses > 1e-12]


def test_inside_of_the_sector_it_is_the_min_norm_point():
    solution = ParetoMTL(references=quarter_circle(3), index=1).solve(
        torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([1.0, 1.0]).double()
    )
    np.testing.assert_allclose(solution.weights, [0.2, 0.8])
    assert solution.note == ""


def test_outside_of_it_by_hand():
    # Wanted: the first axis. Losses (1, 2) violate one border, e2 - e1, so that with G = I the vectors are e1, e2 and
    # e2 - e1. Shortest: 0.4 e1 + 0.2 e2 + ... the hull's triangle has its nearest point to 0 on the edge from e1 to
    # e2 - e1, at (3 e1 + 2 (e2 - e1)) / 5 = (1, 2) / 5.
    solution = ParetoMTL(references=[[1.0, 0.0], [0.0, 1.0]], index=0).solve(
        torch.eye(2).double(), torch.tensor([1.0, 2.0]).double()
    )
    np.testing.assert_allclose(solution.weights, [0.2, 0.4])
    assert solution.note == "outside of the sector"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("searching", [False, True])
def test_every_vector_of_the_hull_has_a_fair_share(seed, searching):
    draw = np.random.default_rng(seed)
    rows, losses = draw.normal(size=(3, 8)), draw.uniform(0.1, 2, 3)
    references = draw.uniform(0, 1, (6, 3)).tolist()
    index = int((np.array(references) @ losses / np.linalg.norm(references, axis=1)).argmin())  # the farthest one
    borders = violated(references, index, losses)
    method = ParetoMTL(references=references, index=index, init_steps=int(searching))
    direction = method(torch.from_numpy(rows), torch.from_numpy(losses)).numpy()
    vectors = borders @ rows if searching else np.vstack([rows, borders @ rows])
    assert (vectors @ direction >= direction @ direction - 1e-9).all()  # the condition of the shortest vector ...
    weights = np.linalg.lstsq(np.vstack([vectors.T, np.ones(len(vectors))]), np.append(direction, 1.0), rcond=None)
    assert weights[0].shape == (len(vectors),)
    hull = np.vstack([vectors.T, np.ones(len(vectors))])
    assert np.linalg.norm(hull @ weights[0] - np.append(direction, 1.0)) < 1e-9  # ... that lies in their span


def test_the_first_phase_ends_when_the_sector_is_reached():
    method = ParetoMTL(references=quarter_circle(3), index=1, init_steps=5)
    outside, inside = torch.tensor([1.0, 9.0]).double(), torch.tensor([1.0, 1.0]).double()
    gramian = torch.eye(2).double()
    assert method.solve(gramian, outside).note == "looking for the sector"
    assert method.solve(gramian, inside).note == ""
    assert method.solve(gramian, outside).note == "outside of the sector"
    method.reset()
    notes = [method.solve(gramian, outside).note for _ in range(7)]
    assert notes == ["looking for the sector"] * 5 + ["outside of the sector"] * 2


@pytest.mark.parametrize("index", range(5))
def test_a_run_ends_on_the_front_in_its_sector(index):
    # Fonseca and Fleming's problem in two variables, whose front is concave: weighted sums reach its ends alone.
    centre = 1 / np.sqrt(2)
    x = torch.tensor([0.3, -0.25], dtype=torch.float64, requires_grad=True)
    references = quarter_circle(5)
    method = ParetoMTL(references=references, index=index, init_steps=30)
    for _ in range(250):
        distances = torch.stack([(x - centre).square().sum(), (x + centre).square().sum()])
        losses = 1 - torch.exp(-distances)
        rows = torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])
        with torch.no_grad():
            x -= 0.1 * method(rows, losses)
    found = losses.detach().numpy()
    front = 1 - np.exp(-((2 - np.sqrt(-np.log(1 - found[0]))) ** 2))
    assert found[1] == pytest.approx(front, abs=5e-3)
    cosines = np.array(references) @ found / np.linalg.norm(found)
    assert cosines[index] > cosines.max() - 5e-3


def test_by_default_it_wants_equal_losses():
    method = ParetoMTL()
    for size in (1, 3):
        assert method.solve(torch.eye(size), torch.ones(size)).note == ""
    given = ParetoMTL(references=[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]], index=3)
    losses = torch.tensor([1.0, 2.0, 7.0])
    assert_close(method.weights(torch.eye(3), losses), given.weights(torch.eye(3), losses))
    assert Promise.PERMUTATION_EQUIVARIANT in method.keeps
    assert Promise.PERMUTATION_EQUIVARIANT not in given.keeps


def test_the_phase_is_state():
    first, second = ParetoMTL(init_steps=3), ParetoMTL(init_steps=3)
    far = (torch.eye(2), torch.tensor([1.0, 9.0]))
    first.weights(*far)
    second.load_state_dict(first.state_dict())
    assert [second.solve(*far).note for _ in range(3)] == ["looking for the sector"] * 2 + ["outside of the sector"]


def test_an_objective_that_sits_out_has_no_gradient_to_offer():
    rows = np.random.default_rng(0).normal(size=(3, 6))
    losses, live = np.array([1.0, 4.0, 2.0]), np.array([True, False, True])
    solution = ParetoMTL()._solve_live(rows @ rows.T, losses, live)
    assert solution.weights[1] == 0
    assert solution.left_out == (1,)
    borders = violated([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], 3, losses)[:, live]
    direction = solution.weights @ rows
    vectors = np.vstack([rows[live], borders @ rows[live]])
    assert (vectors @ direction >= direction @ direction - 1e-9).all()
    assert ParetoMTL()._solve_live(rows @ rows.T, losses, np.zeros(3, dtype=bool)).left_out == (0, 1, 2)


def test_refusals():
    with pytest.raises(ValueError, match="index=2 names none of the 2 references"):
        ParetoMTL(references=[[1.0, 0.0], [0.0, 1.0]], index=2)
    with pytest.raises(ValueError, match="same length"):
        ParetoMTL(references=[[1.0, 0.0], [0.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="init_steps"):
        ParetoMTL(init_steps=-1)
    with pytest.raises(ValueError, match="references must have one number per objective, 3, but got 2"):
        ParetoMTL(references=[[1.0, 0.0], [0.0, 1.0]]).weights(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="index=5 names none of the 3 references"):
        ParetoMTL(index=5).weights(torch.eye(2), torch.ones(2))
