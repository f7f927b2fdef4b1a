"""The sweep over preferences or starting points: where known optima lie, how it is measured, what is written."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import mogb
from mogb.base import option_names
from mogb.cli import main
from mogb.compare.plan import InputError
from mogb.front import Reached, SeedFigures, Sweep, grid, measure, preferring, sweep_front, takes_preference
from mogb.problems import make_problem
from mogb.specs import SpecError, parse_spec

pytestmark = pytest.mark.usefixtures("unchecked")


def call(*arguments):
    try:
        return main(["front", *(str(argument) for argument in arguments)])
    except SystemExit as error:
        return error.code


# --- which preferences ----------------------------------------------------------------------------------------------


def test_two_objectives_get_as_many_preferences_as_asked_for_from_end_to_end():
    points = np.array(grid(2, 5))
    np.testing.assert_allclose(points.sum(1), 1)
    np.testing.assert_allclose(points[:, 0], [0.99, 0.745, 0.5, 0.255, 0.01])
    assert grid(2, 1) == ((0.5, 0.5),)


@pytest.mark.parametrize(
    ("objectives", "asked", "got"), [(3, 15, 15), (3, 14, 10), (3, 1, 3), (4, 20, 20), (64, 9, 64)]
)
def test_more_objectives_get_a_lattice(objectives, asked, got):
    points = np.array(grid(objectives, asked))  # binomial(H + K - 1, K - 1) points: 15 = C(6, 2), 20 = C(6, 3)
    assert points.shape == (got, objectives)
    assert len({tuple(row) for row in points.tolist()}) == got
    np.testing.assert_allclose(points.sum(1), 1)
    assert points.min() > 0  # every method takes them
    np.testing.assert_allclose(points.mean(0), 1 / objectives, atol=1e-9)  # no objective is preferred over all


def test_every_method_with_a_preference_is_swept_over_it():
    swept = {name for name in mogb.registered() if takes_preference(parse_spec(name))}
    have = {
        name
        for name in mogb.registered()
        if {"preference", "references"} & set(option_names(mogb.aggregators.get(name))) or name == "weighted_sum"
    }
    assert swept == have
    assert {"upgrad", "epo", "pareto_mtl", "weighted_sum", "stch", "aligned_mtl"} <= swept
    assert not {"mgda", "pcgrad", "rlw"} & swept


def test_wrappers_pass_the_preference_on_and_a_given_one_stays():
    spec = preferring(parse_spec("smoothed(upgrad,decay=0.5)"), ((0.2, 0.8), (0.8, 0.2)), 1)
    assert str(spec) == "smoothed(upgrad(preference=[0.8,0.2]),decay=0.5)"
    assert not takes_preference(parse_spec("upgrad(preference=[1,2])"))
    both = ((0.2, 0.8), (0.8, 0.2))
    assert str(preferring(parse_spec("pareto_mtl"), both, 1)) == "pareto_mtl(index=1,references=[[0.2,0.8],[0.8,0.2]])"


# --- where it ends --------------------------------------------------------------------------------------------------


def test_a_weighted_sum_of_parabolas_ends_at_the_weighted_mean_of_their_minima():
    # Schaffer: f = (x^2, (x - 2)^2); p x^2 + (1 - p) (x - 2)^2 has its minimum at x = 2 (1 - p).
    reached = sweep_front(Sweep(method="weighted_sum", problem="schaffer", points=5))
    shares = np.array(reached.preferences)[:, 0]
    expected = np.column_stack([(2 * (1 - shares)) ** 2, (2 * shares) ** 2])
    np.testing.assert_allclose(reached.losses[0], expected, atol=0.02)
    (figures,) = reached.figures
    assert figures.arrived == 1.0
    assert figures.non_dominated == 5
    assert reached.swept == "preferences"


def test_tchebycheff_reaches_the_points_where_the_weighted_losses_are_equal():
    # max(p x^2, (1 - p) (x - 2)^2) is smallest where both are equal: x = 2 r / (1 + r), r = sqrt((1 - p) / p).
    reached = sweep_front(Sweep(method="stch(mu=0.02)", problem="schaffer", points=4))
    for (share, _), losses in zip(reached.preferences[1:-1], reached.losses[0][1:-1], strict=True):
        ratio = math.sqrt((1 - share) / share)
        assert losses[0] == pytest.approx((2 * ratio / (1 + ratio)) ** 2, abs=0.05)


def test_without_a_preference_starting_points_are_swept():
    problem = make_problem("fonseca_2d")
    sweep = Sweep(method="mgda", problem="fonseca_2d", points=7, steps=3)
    reached = sweep_front(sweep)
    assert reached.preferences is None
    assert reached.swept == "starting points"
    assert len({tuple(row) for row in reached.losses[0].tolist()}) == 7
    alone = sweep_front(Sweep(method="mgda", problem="fonseca_2d", points=len(problem.starts()), steps=3))
    np.testing.assert_array_equal(alone.losses[0][:5], reached.losses[0][:5])  # the published ones come first


def test_seeds_differ_and_repeat():
    sweep = Sweep(method="pcgrad", problem="specialists", points=3, seeds=2, steps=5)
    one, other = sweep_front(sweep), sweep_front(sweep)
    for first, second in zip(one.losses, other.losses, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(one.losses[0], one.losses[1])


def test_progress_goes_from_nothing_to_all():
    seen = []
    sweep_front(Sweep(method="mgda", problem="schaffer", points=2, seeds=2, steps=300), seen.append)
    assert seen == sorted(seen)
    assert 0.5 in seen
    assert seen[-1] == 1.0


# --- how it is measured ---------------------------------------------------------------------------------------------


def test_the_front_itself_has_nearly_all_the_hypervolume():
    problem = make_problem("fonseca_2d")
    figures = measure(problem, problem.pareto_front(600).numpy())
    assert figures.hypervolume_share == pytest.approx(1, abs=5e-3)
    assert figures.igd_plus == pytest.approx(0, abs=1e-3)
    assert figures.arrived == 1.0
    assert figures.hypervolume_error == 0.0


def test_one_corner_by_hand():
    # Bowls of one size: seen from (1, 1), the point (1/4, 1/4) covers 9/16 of the unit square, and the front 5/6.
    problem = make_problem("bowls_2d")
    losses = np.array([[0.25, 0.25], [0.5, 0.5]]) * problem.units.numpy()
    figures = measure(problem, losses)
    assert figures.hypervolume_share == pytest.approx((9 / 16) / (5 / 6))
    assert figures.non_dominated == 1
    assert figures.arrived == pytest.approx(0.5)


def test_many_objectives_are_sampled_with_an_error():
    problem = make_problem("specialists")
    losses = -0.5 * problem.units.numpy()[None]
    figures = measure(problem, losses)
    assert figures.hypervolume_share == pytest.approx(0.5**4, rel=1e-9)  # one box is hit by every draw
    spread = np.vstack([losses, losses * [1.5, 0.5, 1, 1]])
    figures = measure(problem, spread)
    exact = 0.5**4 * (1 + 1.5 * 0.5 - 0.5)
    assert figures.hypervolume_error > 0
    whole = problem.true_hypervolume
    assert abs(figures.hypervolume - exact * whole) < 5 * figures.hypervolume_error


def test_the_spread_over_seeds_leaves_failed_ones_out():
    figures = (SeedFigures(igd_plus=1.0), SeedFigures(error="why"), SeedFigures(igd_plus=3.0))
    reached = Reached(Sweep(method="mgda", problem="schaffer"), None, (np.zeros((1, 2)),) * 3, figures)
    assert reached.spread("igd_plus") == (2.0, 1.0, 3.0)
    assert reached.spread("hypervolume") is None


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_json_csv_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    assert call("weighted_sum", "--problem", "schaffer", "--points", 3, "--steps", 20, "--out", folder) == 0
    printed = capsys.readouterr().out
    assert "3 preferences, 1 seeds." in printed
    assert "IGD+" in printed
    saved = json.loads((folder / "front.json").read_text())
    assert (saved["method"], saved["problem"], saved["swept"], saved["steps"]) == (
        "weighted_sum", "schaffer", "preferences", 20,
    )  # fmt: skip
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert [float(row["loss_0"]) for row in rows] == [row[0] for row in saved["losses"][0]]
    assert [float(row["preference_1"]) for row in rows] == [row[1] for row in saved["preferences"]]
    assert (folder / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert call("mgda", "--problem", "schaffer", "--out", folder) == 2
    assert "holds an earlier sweep" in capsys.readouterr().err
    again = ("mgda", "--problem", "schaffer", "--points", 2, "--steps", 5, "--no-figures", "--overwrite")
    assert call(*again, "--out", folder) == 0
    assert json.loads((folder / "front.json").read_text())["preferences"] is None


@pytest.mark.parametrize("problem", ["dtlz2", "specialists", "valley"])
def test_pictures_of_two_three_and_more_objectives(problem, tmp_path):
    pytest.importorskip("matplotlib")
    from mogb.front import write_front

    for method in ("weighted_sum", "mgda"):
        reached = sweep_front(Sweep(method=method, problem=problem, points=4, steps=2))
        written = write_front(reached, tmp_path / method)
        assert [path.name for path in written] == ["front.json", "front.csv", "front.png"]
        assert written[-1].stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mgdaa", "--problem", "valley"], "unknown method 'mgdaa'"),
        (["mgda(", "--problem", "valley"], "cannot read"),
        (["mgda", "--problem", "vally"], "unknown problem 'vally'"),
        (["mgda"], "--problem"),
        (["mgda", "--problem", "valley", "--points", "0"], "at least 1"),
        (["mgda", "--problem", "valley", "--seeds", "x"], "at least 1"),
        (["cagrad(c=-3)", "--problem", "valley"], "c must be"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, complaint, capsys, tmp_path):
    assert call(*arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_method_that_refuses_the_problem_is_status_1(capsys, tmp_path):
    # A loss of the valley is 0 where it starts, and ratios of losses need positive ones.
    arguments = ("go4align", "--problem", "valley", "--points", 2, "--steps", 2, "--no-figures")
    assert call(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "seed 0 failed" in error
    assert "'go4align' needs losses above 0" in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_checked_when_it_is_made():
    for options in ({"points": 0}, {"seeds": 0}, {"steps": 0}, {"problem": "nowhere"}):
        with pytest.raises(InputError):
            Sweep(**{"method": "mgda", "problem": "schaffer", **options})
    with pytest.raises(SpecError):
        Sweep(method="mgdaa", problem="schaffer")


def test_noise_is_the_same_for_all_preferences_of_a_seed():
    problem = make_problem("bowls_noisy")
    assert problem.stochastic
    reached = sweep_front(Sweep(method="upgrad", problem="bowls_noisy", points=3, steps=2))
    assert torch.from_numpy(reached.losses[0]).isfinite().all()
