"""Hypervolume, against inclusion and exclusion, moocore and hand calculations."""

import itertools
import sys

import moocore
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogb.metrics import Estimate, estimate_hypervolume, hypervolume


def by_inclusion_and_exclusion(points, reference):
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in itertools.combinations(points, size):
            total -= (-1) ** size * np.prod(np.maximum(reference - np.max(some, axis=0), 0))
    return total


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [False, True])
def test_it_is_the_volume_of_the_union_of_boxes(objectives, grid):
    generator = np.random.default_rng(objectives)
    for count in (1, 2, 5, 9):
        points = generator.random((count, objectives)) * 1.2
        if grid:
            points = np.round(points * 3) / 3
        reference = np.full(objectives, 1.0)
        assert hypervolume(points, reference) == pytest.approx(
            by_inclusion_and_exclusion(points, reference), rel=1e-12, abs=1e-14
        )


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("kind", ["cloud", "front", "grid"])
def test_large_sets_agree_with_moocore(objectives, kind):
    points = np.random.default_rng(7).random((600, objectives))
    if kind == "front":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    if kind == "grid":
        points = np.round(points, 1)
    reference = np.full(objectives, 1.05)
    assert hypervolume(points, reference) == pytest.approx(moocore.hypervolume(points, ref=reference), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_ties_in_space_agree_with_a_count_of_unit_cubes(corners):
    points = np.array(corners, dtype=float)
    cells = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    covered = (cells >= points).all(2).any(1).sum()
    assert hypervolume(points, np.full(3, 5.0)) == covered


def test_points_outside_and_no_points_add_nothing():
    reference = np.array([1.0, 1.0])
    assert hypervolume(np.zeros((0, 2)), reference) == 0.0
    assert hypervolume(np.array([[1.0, 0.0], [2.0, -5.0]]), reference) == 0.0
    assert hypervolume(np.array([[0.5, 0.5], [2.0, -5.0]]), reference) == 0.25
    assert estimate_hypervolume(np.array([[2.0, 2.0]]), reference) == Estimate(0.0, 0.0)


def test_tensors_of_any_dtype_are_welcome():
    points = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float32, requires_grad=True)
    assert hypervolume(points, torch.tensor([3.0, 3.0])) == 3.0


@pytest.mark.parametrize("objectives", [2, 5])
def test_the_estimate_is_within_its_standard_error(objectives):
    points = np.random.default_rng(1).random((30, objectives))
    reference = np.full(objectives, 1.1)
    exact = moocore.hypervolume(points, ref=reference)
    found = [estimate_hypervolume(points, reference, samples=5000, seed=seed) for seed in range(60)]
    errors = np.array([(one.value - exact) / one.standard_error for one in found])
    assert np.abs(errors).max() < 4
    assert 0.7 < errors.std() < 1.3
    assert found[0] == estimate_hypervolume(points, reference, samples=5000, seed=0)


def test_without_moocore_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ImportError, match=r"4 objectives needs moocore: pip install 'mogb\[metrics\]'"):
        hypervolume(np.zeros((1, 4)), np.ones(4))
    assert hypervolume(np.zeros((1, 3)), np.ones(3)) == 1.0


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="points holds NaN or Inf"):
        hypervolume(np.array([[np.inf, 0.0]]), np.ones(2))
    with pytest.raises(ValueError, match="samples must be at least 2, but got 1"):
        estimate_hypervolume(np.zeros((1, 2)), np.ones(2), samples=1)
