"""Whole comparisons, of a few steps, through the Python door."""

import json
import math

import numpy as np
import pytest
import torch

from mogb.compare import InputError, run
from mogb.compare.merge import read_summary
from mogb.compare.summary import COLUMNS, Summary, to_csv
from mogb.problems import make_problem

METHODS = ["weighted_sum", "mgda", "graddrop", "rlw", "smoothed(mgda,decay=0.5)"]
PROBLEMS = ["quadratic_scaled", "specialists"]


def summary_of(records):
    settings = {
        "methods": sorted({r["method"] for r in records}), "problems": sorted({r["problem"] for r in records}),
        "seeds": 1 + max(r["seed"] for r in records), "steps": None, "quick": False, "mogb": "test",
    }  # fmt: skip
    return Summary(settings, {record["key"]: record for record in records})


def without_clock(records):
    return [{k: v for k, v in r.items() if k not in ("wall_seconds", "cpu_seconds", "versions")} for r in records]


def test_records_come_in_the_order_of_the_plan_with_everything_in_them():
    records = run(METHODS, PROBLEMS, seeds=2, steps=4)
    assert [r["key"] for r in records] == [f"{p}/{s}/{m}" for p in PROBLEMS for s in (0, 1) for m in METHODS]
    assert {r["status"] for r in records} == {"ok"}
    for record in records:
        starts, size = record["starts"], make_problem(record["problem"]).num_objectives
        assert np.shape(record["losses"]) == (starts, size)
        for name in (
            "distance",
            "stationarity",
            "stationarity_gap",
            "conflict_rate",
            "cosine_worst",
            "steps_to_tolerance",
        ):
            assert len(record[name]) == starts
        json.dumps(record, allow_nan=False)


def test_end_points_are_measured_right():
    (record,) = run(["mgda"], ["quadratic_scaled"], steps=40)
    problem = make_problem("quadratic_scaled")
    ends = torch.tensor(record["ends"], dtype=torch.float64)
    losses = problem.losses(ends)
    np.testing.assert_allclose(record["losses"], losses, rtol=1e-10)
    np.testing.assert_allclose(record["distance"], problem.distance_to_front(losses), rtol=1e-6, atol=1e-12)
    for index, (_, rows) in enumerate(zip(ends, problem.jacobian(ends)[1], strict=True)):
        shares = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
        shortest = (shares * rows[0] + (1 - shares) * rows[1]).norm(dim=1).min() / rows.norm(dim=1).max()
        assert record["stationarity"][index] == pytest.approx(float(shortest), abs=1e-6)
    corner, area = problem.reference_point.numpy(), 0.0
    best = math.inf
    for f1, f2 in sorted(map(tuple, losses.numpy())):  # a staircase by hand
        if f1 < corner[0] and f2 < min(best, corner[1]):
            area += (corner[0] - f1) * (min(best, corner[1]) - f2)
            best = f2
    assert record["hypervolume"] == pytest.approx(area)
    assert record["hypervolume_ratio"] == pytest.approx(area / problem.true_hypervolume)


def test_the_hypervolume_of_four_objectives_is_that_of_one_box_for_one_point():
    (record,) = run(["mgda"], ["specialists"], steps=1)
    losses, corner = np.array(record["losses"]), make_problem("specialists").reference_point.numpy()
    boxes = np.prod(corner - losses, axis=1)
    assert max(boxes) <= record["hypervolume"] <= sum(boxes)
    grid = np.random.default_rng(0).uniform(losses.min(0), corner, size=(200_000, 4))
    covered = (losses[:, None] <= grid).all(2).any(0).mean() * np.prod(corner - losses.min(0))
    assert record["hypervolume"] == pytest.approx(covered, rel=0.02)


def test_steps_to_tolerance_are_the_first_within_it():
    (record,) = run(["weighted_sum"], ["quadratic_elementwise"])
    problem = make_problem("quadratic_elementwise")
    for start, first in zip(problem.starts(), record["steps_to_tolerance"], strict=True):
        x, count = start.clone(), 0
        while float(problem.distance_to_front(problem.losses(x))) > problem.settings.tolerance:
            x = x - problem.settings.lr * problem.jacobian(x[None])[1][0].mean(0)
            count += 1
        assert first == count


def test_workers_do_not_change_a_number(tmp_path):
    alone = run(METHODS, PROBLEMS, steps=3, workers=0, out=tmp_path / "alone")
    together = run(METHODS, PROBLEMS, steps=3, workers=2, out=tmp_path / "together")
    assert without_clock(alone) == without_clock(together)
    assert to_csv(read_summary(tmp_path / "alone")) == to_csv(read_summary(tmp_path / "together"))


def test_a_run_does_not_depend_on_its_company():
    (alone,) = run(["rlw"], ["specialists"], steps=5)
    among = run(["mgda", "rlw"], ["valley", "specialists"], steps=5, seeds=2)
    assert without_clock([alone]) == without_clock([r for r in among if r["key"] == alone["key"]])


def test_seeds_starts_and_methods_have_noise_of_their_own():
    records = run(["rlw", "rlw(seed=1)"], ["specialists"], steps=5, seeds=2)
    ends = [json.dumps(record["losses"]) for record in records]
    assert len(set(ends)) == 4


def test_a_method_that_fails_is_a_record_that_says_why_and_ranks_last():
    records = run(["mgda", "weighted_sum(weights=[1.0,1.0,1.0])"], ["valley"], steps=3)
    assert [record["status"] for record in records] == ["ok", "failed"]
    assert records[1]["error"].startswith("step 1, start 0: weights must have one number per objective, 2, but got 3")
    summary = summary_of(records)
    ranks = {row["method"]: (row["rank"], row["failed"], row["error"]) for row in summary.rows}
    assert ranks["mgda"] == (1.0, 0, None)
    assert ranks["weighted_sum(weights=[1.0,1.0,1.0])"] == (2.0, 1, records[1]["error"])


def test_a_method_with_a_bug_is_a_record_that_names_the_place(monkeypatch):
    def broken(self, *inputs):
        raise KeyError("oops")

    monkeypatch.setattr("mogb.aggregators.mgda.MGDA._weights", broken)
    (record,) = run(["mgda"], ["valley"], steps=3)
    assert record["status"] == "failed"
    assert "KeyError: 'oops' (broken, line" in record["error"]


def test_summary_rows_are_averages_over_seeds_and_starts():
    records = run(["mgda"], ["specialists"], steps=4, seeds=2)
    (row,) = summary_of(records).rows
    assert tuple(row) == COLUMNS
    distances = [value for record in records for value in record["distance"]]
    assert len(distances) == 6
    assert row["distance_mean"] == pytest.approx(np.mean(distances))
    assert row["distance_median"] == pytest.approx(np.median(distances))
    assert row["igd_plus"] == pytest.approx(np.mean([record["igd_plus"] for record in records]))
    rates = [value for record in records for value in record["held_out_conflict_rate"]]
    assert row["held_out_conflict_rate"] == pytest.approx(np.mean(rates))
    assert (row["runs"], row["failed"], row["rank"]) == (2, 0, 1.0)


def test_arriving_within_the_tolerance_is_a_tie():
    records = run(["weighted_sum", "pcgrad", "mgda"], ["quadratic_elementwise"])
    rows = {row["method"]: row for row in summary_of(records).rows}
    assert rows["weighted_sum"]["distance_max"] != rows["pcgrad"]["distance_max"]
    assert rows["weighted_sum"]["rank"] == rows["pcgrad"]["rank"] < rows["mgda"]["rank"]
    assert rows["mgda"]["arrived"] == pytest.approx(1 / 5)  # only from (-4, 4), where the gradients are equally long


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"methods": ["mgdaa"]}, "methods: unknown method 'mgdaa'.*mgda"),
        ({"methods": ["cagrad(d=1)"]}, "methods: 'cagrad' has no option 'd'"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["mgda", "mgda"]}, "methods names 'mgda' twice"),
        ({"problems": ["vally"]}, "problems: unknown problem 'vally'.*valley"),
        ({"problems": []}, "problems is empty"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, but got 0"),
        ({"steps": -3}, "steps must be a whole number of at least 1, but got -3"),
        ({"workers": -1}, "workers must be a whole number of at least 0, but got -1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        run(**({"methods": ["mgda"], "problems": ["valley"], "steps": 1} | arguments))
