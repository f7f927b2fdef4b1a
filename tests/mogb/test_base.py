"""What is common to all methods: cards, solutions, leaving objectives out, state, wrappers."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mogb
from mogb.aggregators.graddrop import GradDrop
from mogb.aggregators.mgda import MGDA
from mogb.aggregators.upgrad import UPGrad
from mogb.aggregators.weighted_sum import WeightedSum
from mogb.base import GramianAggregator, Reference, Solution, needs_losses, option_names, state
from mogb.wrappers import WRAPPERS
from mogb.wrappers.logarithmic import Logarithmic
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.smoothed import Smoothed


@dataclass(kw_only=True)
class Counting(GramianAggregator):
    """Weights that count the steps; state of every kind."""

    seed: int = 0
    step: int = state(0, kind="number")
    past: np.ndarray | None = state()
    _rows: torch.Tensor | None = state(kind="tensor")
    _generator: torch.Generator = state(kind="generator")
    seen: list = field(default_factory=list, init=False, repr=False, compare=False)

    def _start(self):
        self._generator = torch.Generator().manual_seed(self.seed)

    def _weights(self, gramian):
        self.seen.append(gramian)
        self.step += 1
        self.past = np.full(len(gramian), float(self.step))
        self._rows = torch.rand(2, generator=self._generator)
        return Solution(self.past + float(self._rows.sum()))


class TestReference:
    def test_a_published_paper(self):
        reference = Reference(authors="A. Author, B. Writer and C. Poet", title="On X", venue="Journal", year=2020)
        assert reference.bibtex("key") == (
            "@inproceedings{key,\n  author = {A. Author and B. Writer and C. Poet},\n  title = {{On X}},\n"
            "  year = {2020},\n  booktitle = {Journal}\n}"
        )

    def test_a_preprint(self):
        entry = Reference(authors="A. Author", title="On X", year=2020, arxiv="2001.00001").bibtex("key")
        assert entry.startswith("@misc{key,")
        assert "eprint = {2001.00001}" in entry


class TestSolution:
    def test_among_spreads_everything_that_is_one_per_objective(self):
        solution = Solution(
            np.array([0.25, 0.75]),
            residual=1e-3,
            left_out=(1,),
            note="why",
            details={"simplex": np.array([1.0, 2.0]), "other": np.array([5.0, 6.0, 7.0])},
        )
        spread = solution.among(np.array([True, False, True, False]))
        assert spread.weights.tolist() == [0.25, 0, 0.75, 0]
        assert spread.left_out == (1, 2, 3)
        assert spread.details["simplex"].tolist() == [1, 0, 2, 0]
        assert spread.details["other"].tolist() == [5, 6, 7]
        assert (spread.residual, spread.note) == (1e-3, "why")


class TestLeavingOut:
    def test_the_method_sees_the_others_alone(self):
        agg = Counting()
        gramian = np.arange(9.0).reshape(3, 3)
        solution = agg._solve_live(gramian, None, np.array([True, False, True]))
        assert agg.seen[0].tolist() == [[0, 2], [6, 8]]
        assert solution.left_out == (1,)
        assert solution.weights[1] == 0

    def test_nobody_left_is_no_direction_and_no_step(self):
        agg = Counting()
        solution = agg._solve_live(np.zeros((2, 2)), None, np.zeros(2, dtype=bool))
        assert not solution.weights.any()
        assert solution.left_out == (0, 1)
        assert agg.step == 0

    def test_options_per_objective_are_picked(self):
        live = np.array([False, True, True])
        assert WeightedSum(weights=[1.0, 2.0, 3.0])._only(live).fixed == (2.0, 3.0)
        assert UPGrad(preference=[1.0, 2.0, 3.0])._only(live).preference == (2.0, 3.0)
        assert MGDA()._only(live) == MGDA()


class TestState:
    def test_every_kind_comes_back(self):
        agg, other = Counting(seed=3), Counting(seed=3)
        for _ in range(3):
            agg(torch.eye(2))
        saved = agg.state_dict()
        assert sorted(saved) == ["generator", "past", "rows", "step"]
        other.load_state_dict(saved)
        assert other.step == 3
        assert torch.equal(agg(torch.eye(2)), other(torch.eye(2)))

    def test_reset_restores_the_seed(self):
        agg = Counting(seed=3)
        first = agg(torch.eye(2))
        agg.reset()
        assert agg.step == 0
        assert agg.past is None
        assert torch.equal(agg(torch.eye(2)), first)

    def test_state_is_no_option_and_no_part_of_the_repr(self):
        assert option_names(Counting) == ("seed",)
        assert repr(Counting(seed=3)) == "Counting(seed=3)"
        with pytest.raises(TypeError):
            Counting(step=1)

    def test_a_foreign_state_is_refused_and_nothing_is_lost(self):
        agg = Counting()
        agg(torch.eye(2))
        with pytest.raises(ValueError, match="has no state named average"):
            agg.load_state_dict({"average": torch.ones(2)})
        assert agg.step == 1


class TestWrappers:
    def test_the_state_inside_is_saved_too(self):
        agg = Smoothed(Counting(), decay=0.5)
        agg(torch.eye(2))
        assert {"average", "inner.step", "inner.generator"} <= set(agg.state_dict())
        other = Smoothed(Counting(), decay=0.5)
        other.load_state_dict(agg.state_dict())
        assert torch.equal(agg(torch.eye(2)), other(torch.eye(2)))
        agg.reset()
        assert agg.inner.step == 0

    def test_they_nest(self):
        agg = Normalized(Smoothed(Normalized(MGDA())))
        assert agg.reads == "gramian"
        assert agg.reference == MGDA.reference
        assert_close(agg(torch.diag(torch.tensor([3.0, 1.0]))), torch.tensor([0.5, 0.5]))

    @pytest.mark.parametrize("cls", WRAPPERS.values(), ids=WRAPPERS.keys())
    def test_what_they_cannot_wear_is_refused(self, cls, unchecked):
        with pytest.raises(ValueError, match="needs a method that yields weights, but inner='graddrop'"):
            cls(inner=GradDrop())
        with pytest.raises(TypeError, match="inner must be an aggregator"):
            cls(inner="mgda")

    @pytest.mark.parametrize("cls", WRAPPERS.values(), ids=WRAPPERS.keys())
    def test_the_registry_of_wrappers_holds_their_files(self, cls):
        name = next(name for name, other in WRAPPERS.items() if other is cls)
        assert cls.__module__ == f"mogb.wrappers.{name}"

    def test_losses_are_needed_where_anything_inside_or_outside_reads_them(self):
        assert not needs_losses(Smoothed(WeightedSum()))
        assert needs_losses(Smoothed(MGDA(normalization="loss")))
        assert needs_losses(Smoothed(Logarithmic(WeightedSum())))
        assert Smoothed(Logarithmic(WeightedSum())).reads == "losses"
        assert Smoothed(WeightedSum()).reads == "losses"


class TestMake:
    def test_registered_names_are_sorted_and_hold_the_launch_methods(self):
        launch = {
            "weighted_sum", "mgda", "marble", "pcgrad", "nash_mtl", "cagrad", "imtl_g", "aligned_mtl", "upgrad",
            "dualproj", "config", "fairgrad", "graddrop", "rlw",
        }  # fmt: skip
        assert list(mogb.registered()) == sorted(mogb.registered())
        assert launch <= set(mogb.registered())

    def test_options_reach_the_method(self):
        assert mogb.make("cagrad", c=0.25).c == 0.25
        assert mogb.make("marble", decay=0.5).decay == 0.5

    def test_default_options_are_those_of_the_contract(self):
        assert mogb.make("marble").decay == 0.7
        assert mogb.make("nash_mtl").max_norm == 1.0
        assert mogb.make("fairgrad").alpha == 1.0
        assert mogb.make("pcgrad").reduction == "sum"
        assert mogb.make("weighted_sum") == WeightedSum(weights=None)


def test_a_direction_that_overflows_its_dtype_is_an_error():
    with pytest.raises(mogb.NonFiniteError, match="overflowed its dtype") as caught:
        WeightedSum(weights=[1e5, 1e5])(torch.full((2, 2), 1e4, dtype=torch.float16))
    assert caught.value.index is None


def test_a_nan_that_only_stands_off_the_diagonal_is_found():
    gramian = torch.eye(3)
    gramian[1, 2] = float("nan")
    with pytest.raises(mogb.NonFiniteError) as caught:
        MGDA().weights(gramian)
    assert caught.value.index == 1
