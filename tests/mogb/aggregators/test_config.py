import pytest
import torch
from jacobians import random, zoo
from torch.testing import assert_close

from mogb.aggregators.config import ConFIG


def published(jacobian, preference=None, length=None):
    """The definition, with the pseudo-inverse of the unit rows."""
    norms = jacobian.norm(dim=1, keepdim=True)
    target = torch.ones(len(jacobian), dtype=torch.float64) if preference is None else preference
    along = torch.linalg.pinv(jacobian / norms, rtol=1e-12) @ target
    along = along / along.norm()
    rows = jacobian if length is None else jacobian / norms * length(norms)
    return (rows @ along).sum() * along


@pytest.mark.parametrize(
    "label",
    ["one row", "two rows", "random 3", "random 16", "duplicate rows", "more rows than columns", "spread of 1e6"],
)
def test_the_gramian_form_equals_the_pseudo_inverse(label):
    jacobian = zoo()[label]
    assert_close(ConFIG()(jacobian), published(jacobian), rtol=1e-8, atol=1e-10 * float(jacobian.norm()))


def test_all_cosines_are_equal_and_positive():
    jacobian = random(5, 30, conflict=0.9, spread=4.0)
    direction = ConFIG()(jacobian)
    cosines = jacobian @ direction / jacobian.norm(dim=1)
    assert cosines.min() > 0
    assert_close(cosines, cosines[:1].expand(5), rtol=1e-8, atol=0)


def test_orthogonal_gradients_by_hand():
    # The bisector (1, 1) / sqrt(2), onto which (3, 0) and (0, 1) project with 4 / sqrt(2) in all.
    assert_close(ConFIG()(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), torch.tensor([2.0, 2.0]))


def test_preferences_are_the_ratio_of_the_cosines():
    jacobian = random(3, 10)
    direction = ConFIG(preference=[1.0, 2.0, 4.0])(jacobian)
    cosines = jacobian @ direction / jacobian.norm(dim=1)
    assert_close(cosines / cosines[0], torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("track_minimum", torch.min),
        ("track_maximum", torch.max),
        ("track_arithmetic_average", torch.mean),
        ("track_harmonic_average", lambda norms: 1 / (1 / norms).mean()),
        ("track_geometric_average", lambda norms: norms.log().mean().exp()),
        ("track_specific", lambda norms: norms[2]),
    ],
)
def test_length_models(name, length):
    jacobian = random(4, 9, spread=2.0)
    agg = ConFIG(length=name, track=2 if name == "track_specific" else None)
    assert_close(agg(jacobian), published(jacobian, length=length))


def test_a_tracked_objective_keeps_its_place_when_others_are_left_out():
    jacobian = random(4, 9)
    jacobian[0] = 0
    agg = ConFIG(length="track_specific", track=2)
    assert_close(agg(jacobian), published(jacobian[1:], length=lambda norms: norms[1]))
    with pytest.raises(ValueError, match="track=0 must be an objective with a gradient that is not zero"):
        ConFIG(length="track_specific", track=0)(jacobian)


def test_preferences_keep_their_place_when_others_are_left_out():
    jacobian = random(4, 9)
    jacobian[1] = 0
    live = jacobian[[0, 2, 3]]
    expected = published(live, preference=torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64))
    assert_close(ConFIG(preference=[1.0, 2.0, 3.0, 4.0])(jacobian), expected)


def test_opposite_gradients_have_no_such_direction():
    solution = ConFIG().solve(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))
    assert not solution.weights.any()
    assert "stationary" in solution.note


@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="track names the objective of length='track_specific'"):
        ConFIG(length="track_specific")
    with pytest.raises(ValueError, match="track names the objective"):
        ConFIG(track=1)
    with pytest.raises(ValueError, match="0 or more"):
        ConFIG(length="track_specific", track=-1)
    with pytest.raises(ValueError, match="one of 3 objectives, but got 3"):
        ConFIG(length="track_specific", track=3)(torch.eye(3))
