"""What every method owes its users. Runs over the registry and over the wrappers: a new method is tested from its
first line on, with its default options and with every other value of an option that is a choice of names.

A method that reads the losses gets positive ones. Nothing else is needed: every method can be made from its name.
"""

import copy
import functools
import math
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from jacobians import SCALES, random, zoo
from torch.testing import assert_close

import mogb
from mogb.aggregators import get
from mogb.base import Aggregator, Promise, Reference, Solution, needs_losses, option_names
from mogb.jacobian import Jacobian
from mogb.wrappers import WRAPPERS

ZOO = zoo()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Inside wrappers: a simplex method, one that is none, one that draws, one that reads the losses alone.
WORN = ("mgda", "upgrad", "pcgrad", "weighted_sum")


def variants():
    """Label -> how to make a fresh instance."""
    found = {}
    for name in mogb.registered():
        found[name] = functools.partial(mogb.make, name)
        for option, annotation in get_type_hints(get(name)).items():
            if get_origin(annotation) is Literal and option in option_names(get(name)):
                for value in get_args(annotation):
                    make = functools.partial(mogb.make, name, **{option: value})
                    try:
                        differs = make() != mogb.make(name)
                    except (ValueError, ImportError):  # needs another option beside it, or a package
                        continue
                    if differs:
                        found[f"{name}({option}={value})"] = make
    for wrapper, cls in WRAPPERS.items():
        for name in WORN:
            found[f"{wrapper}({name})"] = lambda cls=cls, name=name: cls(inner=mogb.make(name))
    return found


VARIANTS = variants()
every_method = pytest.mark.parametrize("method", VARIANTS)
every_name = pytest.mark.parametrize("name", mogb.registered())


def yielding(condition):
    return pytest.mark.parametrize("method", [label for label, make in VARIANTS.items() if condition(make())])


every_weighting = yielding(lambda agg: agg.yields_weights)


def promising(promise):
    return yielding(lambda agg: promise in agg.keeps)


def losses_for(agg, size, dtype=torch.float64):
    """Positive losses for the methods that read them."""
    return torch.linspace(0.5, 2.0, size, dtype=dtype) if needs_losses(agg) else None


def call(method, jacobian, scale=1.0):
    """The direction of a fresh instance, with the losses multiplied by ``scale``."""
    agg = VARIANTS[method]()
    losses = losses_for(agg, len(jacobian))
    return agg(jacobian, None if losses is None else losses * scale)


def solve(method, jacobian, scale=1.0):
    """The solution of a fresh instance; None if it yields no weights."""
    agg = VARIANTS[method]()
    losses = losses_for(agg, len(jacobian))
    gramian = jacobian @ jacobian.mT
    return agg.solve(gramian, None if losses is None else losses * scale) if agg.yields_weights else None


class Answer(NamedTuple):
    direction: torch.Tensor
    solution: Solution | None
    mass: float  # the size of the terms that add up to the direction, and so of what rounding changes in it


def mass_of(solution, jacobian):
    norms = jacobian.norm(dim=1)
    return float(norms.sum()) if solution is None else float(np.abs(solution.weights) @ norms.numpy())


@functools.cache
def answer(method, label):
    jacobian = ZOO[label]
    solution = solve(method, jacobian)
    return Answer(call(method, jacobian), solution, mass_of(solution, jacobian))


def on_each_jacobian(check):
    """Runs the check on all of them, and says on which ones it failed."""
    failed = []
    for label in ZOO:
        try:
            check(label, ZOO[label])
        except AssertionError as error:  # noqa: PERF203
            failed.append(f"{label}: {error}")
    assert not failed, "\n\n".join(failed)


def unit(vector):
    return vector / vector.norm() if vector.norm() > 0 else vector


@every_method
def test_shapes_inside_are_as_annotated(method):
    """With the type checks of the test suite, which the other tests go without: they are slow."""
    for label in ("one row", "random 3", "zero row", "opposite pair", "more rows than columns"):
        call(method, ZOO[label])
        solve(method, ZOO[label])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_method
def test_a_gpu_gives_the_direction_of_the_cpu(method):
    jacobian = random(4, 3000, conflict=0.5)
    agg = VARIANTS[method]()
    losses = losses_for(agg, 4)
    direction = agg(jacobian.cuda(), None if losses is None else losses.cuda())
    assert direction.is_cuda
    assert direction.isfinite().all()
    if agg.yields_weights:
        assert_close(direction.cpu(), call(method, jacobian))


class TestInputs:
    pytestmark = pytest.mark.usefixtures("unchecked")

    @every_method
    def test_the_direction_has_the_shape_and_the_dtype_and_is_finite(self, method):
        def check(label, jacobian):
            direction = answer(method, label).direction
            assert direction.shape == jacobian.shape[1:]
            assert direction.dtype == jacobian.dtype
            assert direction.isfinite().all()

        on_each_jacobian(check)

    @every_method
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_gives_the_direction_of_float64_in_its_own_precision(self, method, dtype):
        for full in (random(3, 300, conflict=0.5), random(5, 20, spread=2.0)):
            jacobian = full.to(dtype)
            direction = call(method, jacobian)
            assert direction.dtype == dtype
            exact = jacobian.double()
            allowed = 8 * torch.finfo(dtype).eps * mass_of(solve(method, exact), exact)
            assert_close(direction.double(), call(method, exact), rtol=0, atol=allowed)

    @every_weighting
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_weights_come_in_the_dtype_of_the_gramian(self, method, dtype):
        agg = VARIANTS[method]()
        weights = agg.weights(torch.eye(3, dtype=dtype), losses_for(agg, 3))
        assert weights.dtype == dtype
        assert weights.shape == (3,)
        assert weights.isfinite().all()

    @yielding(lambda agg: not agg.yields_weights)
    def test_methods_without_weights_say_so(self, method):
        with pytest.raises(TypeError, match="yields no weights"):
            VARIANTS[method]().weights(torch.eye(3))

    @every_method
    def test_half_precision_rows_of_any_norm(self, method):
        half, brain = torch.float16, torch.bfloat16
        for dtype, scale in ((half, 1e-4), (half, 300.0), (brain, 1e-12), (brain, 1e12)):
            direction = call(method, (random(4, 50) * scale).to(dtype))
            assert direction.isfinite().all(), (dtype, scale)

    @every_method
    def test_memory_layout_does_not_matter(self, method):
        jacobian = random(4, 10)
        expected = call(method, jacobian)
        assert_close(call(method, jacobian.mT.contiguous().mT), expected)
        padded = torch.full((8, 20), float("nan"), dtype=torch.float64)
        padded[::2, ::2] = jacobian
        assert_close(call(method, padded[::2, ::2]), expected)

    @every_weighting
    def test_blocks_of_parameters_are_one_gradient(self, method):
        agg, jacobian = VARIANTS[method](), random(3, 24)
        losses = losses_for(agg, 3)
        blocks = Jacobian((jacobian[:, :4].reshape(3, 2, 2), jacobian[:, 4:5].reshape(3), jacobian[:, 5:].unsqueeze(1)))
        parts, _, solution = agg.direct(blocks, None if losses is None else losses.numpy())
        assert [part.shape for part in parts] == [(2, 2), (), (1, 19)]
        if agg.reads != "jacobian" and solution is not None and "block" not in method:
            assert_close(torch.cat([part.reshape(-1) for part in parts]), call(method, jacobian))

    @every_method
    def test_the_input_stays_as_it_is(self, method):
        jacobian = random(3, 6).requires_grad_()
        before, agg = jacobian.detach().clone(), VARIANTS[method]()
        direction = agg(jacobian, losses_for(agg, 3))
        assert not direction.requires_grad
        direction += 1
        assert torch.equal(jacobian.detach(), before)
        if agg.yields_weights:
            gramian, agg = before @ before.mT, VARIANTS[method]()
            copied = gramian.clone()
            agg.weights(gramian, losses_for(agg, 3)).add_(1)
            assert torch.equal(gramian, copied)

    @every_weighting
    def test_weights_and_direction_agree(self, method):
        def check(label, jacobian):
            direction, solution, _ = answer(method, label)
            expected = torch.from_numpy(solution.weights) @ jacobian
            assert_close(direction, expected, rtol=1e-6, atol=slack_of(method, label))

        on_each_jacobian(check)

    @yielding(lambda agg: agg.yields_weights)
    def test_the_certificate_is_honest(self, method):
        def check(label, jacobian):
            solution = answer(method, label).solution
            assert solution.residual >= 0
            assert set(solution.left_out) <= set(range(len(jacobian)))
            assert all(solution.weights[index] == 0 for index in solution.left_out)
            assert not (solution.converged and solution.residual > 1e-6)

        on_each_jacobian(check)

    @every_name
    def test_the_default_solver_reaches_what_float64_can_resolve(self, name):
        def check(label, jacobian):
            if label != "hardly not stationary":  # inner products that cancel to 1e-12 keep four digits
                solution = answer(name, label).solution
                assert solution.converged
                assert solution.residual < 1e-6

        if mogb.make(name).yields_weights:
            on_each_jacobian(check)


class TestDegenerate:
    pytestmark = pytest.mark.usefixtures("unchecked")

    @every_method
    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_no_gradient_gives_no_direction(self, method, size):
        direction = call(method, torch.zeros(size, 4, dtype=torch.float64))
        assert torch.equal(direction, torch.zeros(4, dtype=torch.float64))

    @every_method
    def test_one_objective_is_followed(self, method):
        direction, gradient = answer(method, "one row").direction, ZOO["one row"][0]
        assert direction @ gradient > 0
        if VARIANTS[method]().yields_weights:  # a method on coordinates may scale each of them
            assert_close(unit(direction), unit(gradient))

    @yielding(lambda agg: getattr(agg, "leaves_out_zero", False))
    def test_zero_rows_that_are_left_out_change_nothing_for_the_others(self, method):
        jacobian = random(4, 9, conflict=0.5)
        holes = torch.zeros(6, 9, dtype=torch.float64)
        holes[[0, 2, 3, 5]] = jacobian
        solution = solve(method, holes)
        assert solution.left_out == (1, 4)
        agg = VARIANTS[method]()
        if not needs_losses(agg):
            assert_close(torch.from_numpy(solution.weights[[0, 2, 3, 5]]), agg.weights(jacobian @ jacobian.mT))

    @pytest.mark.parametrize("name", ["marble", "nash_mtl", "fairgrad", "imtl_g", "config"])
    def test_these_leave_out_zero_rows(self, name):
        assert answer(name, "zero row").solution.left_out == (4,)
        assert_close(answer(name, "zero row").direction, call(name, ZOO["zero row"][:4]))


class TestPromises:
    pytestmark = pytest.mark.usefixtures("unchecked")

    @promising(Promise.NON_CONFLICTING)
    def test_non_conflicting(self, method):
        def check(label, jacobian):
            direction, _, mass = answer(method, label)
            slack = 1e-12 * len(jacobian) * mass * jacobian.norm(dim=1)
            assert (jacobian @ direction >= -slack).all(), (jacobian @ direction, slack)

        on_each_jacobian(check)

    @promising(Promise.SIMPLEX_WEIGHTS)
    def test_simplex_weights(self, method):
        def check(label, jacobian):
            weights = answer(method, label).solution.weights
            assert weights.min() >= 0
            assert math.isclose(weights.sum(), 1, rel_tol=1e-12)

        on_each_jacobian(check)

    @promising(Promise.PERMUTATION_EQUIVARIANT)
    def test_permutation_equivariant(self, method):
        def check(label, jacobian):
            order = torch.randperm(len(jacobian), generator=torch.Generator().manual_seed(3))
            agg = VARIANTS[method]()
            losses = losses_for(agg, len(jacobian))
            direction = agg(jacobian[order], None if losses is None else losses[order])
            assert_close(direction, answer(method, label).direction, rtol=1e-7, atol=slack_of(method, label))

        on_each_jacobian(check)

    @promising(Promise.SCALE_FREE)
    def test_scale_free(self, method):
        def check(label, jacobian):
            factors = torch.ones(len(jacobian), dtype=torch.float64)
            factors[0], factors[-1] = 1e-3, 1e4
            scaled = factors[:, None] * jacobian
            other = call(method, scaled, factors)
            other_mass = mass_of(solve(method, scaled, factors), scaled)
            direction, _, mass = answer(method, label)
            if direction.norm() <= 1e-8 * mass or other.norm() <= 1e-8 * other_mass:  # stationary, up to rounding
                assert direction.norm() <= 1e-5 * mass
                assert other.norm() <= 1e-5 * other_mass
                return
            slack = 1e-9 * (mass / float(direction.norm()) + other_mass / float(other.norm()))
            assert_close(unit(other), unit(direction), rtol=0, atol=slack)

        on_each_jacobian(check)

    @promising(Promise.HOMOGENEOUS)
    @pytest.mark.parametrize("scale", SCALES)
    def test_homogeneous(self, method, scale):
        def check(label, jacobian):
            direction = call(method, scale * jacobian, scale) / scale
            assert_close(direction, answer(method, label).direction, rtol=1e-7, atol=slack_of(method, label))

        on_each_jacobian(check)

    @every_name
    def test_the_class_promises_what_its_default_options_keep(self, name):
        assert mogb.make(name).keeps == get(name).promises
        assert all(isinstance(promise, Promise) for promise in get(name).promises)


def slack_of(method, label):
    """What rounding in the Gramian may change in a direction, in absolute terms."""
    share = 1e-7 if method.startswith("rescaled") else 1e-13  # a Gramian tells norms to the square root of rounding
    return 1e-9 * answer(method, label).mass + share * float(ZOO[label].norm(dim=1).max())


class TestBadInput:
    pytestmark = pytest.mark.usefixtures("unchecked")

    @every_method
    def test_non_finite_gradients_are_named(self, method):
        nan, inf = float("nan"), float("inf")
        for bad, index, length in ((nan, 2, 6), (inf, 0, 6), (-inf, 2, 6), (nan, 0, 200_000), (-inf, 2, 200_000)):
            agg = VARIANTS[method]()
            jacobian = torch.ones(3, length, dtype=torch.float32) * torch.tensor([[1.0], [2.0], [-1.0]])
            jacobian[index, length // 2] = bad
            with pytest.raises(mogb.NonFiniteError) as caught:
                agg(jacobian, losses_for(agg, 3))
            assert (caught.value.what, caught.value.index) == ("gradient", index), (bad, index, length)

    @every_weighting
    def test_non_finite_gramians_and_losses_are_named(self, method):
        agg = VARIANTS[method]()
        gramian = torch.eye(3)
        gramian[1] = gramian[:, 1] = float("nan")
        with pytest.raises(mogb.NonFiniteError) as caught:
            agg.weights(gramian, losses_for(agg, 3))
        assert (caught.value.what, caught.value.index) == ("gradient", 1)
        for bad in (float("nan"), float("inf")):
            with pytest.raises(mogb.NonFiniteError) as caught:
                agg.weights(torch.eye(3), torch.tensor([1.0, 1.0, bad]))
            assert (caught.value.what, caught.value.index) == ("loss", 2)

    @every_method
    def test_a_failed_step_leaves_the_state(self, method):
        agg = VARIANTS[method]()
        steps(agg, 2)
        before = agg.state_dict()
        jacobian = random(3, 6)
        jacobian[1, 1] = float("nan")
        with pytest.raises(mogb.NonFiniteError):
            agg(jacobian, losses_for(agg, 3))
        same_state(agg.state_dict(), before)

    @every_method
    def test_no_jacobian(self, method):
        for jacobian, error, message in (
            (torch.ones(2, 3, dtype=torch.int64), TypeError, "floating-point"),
            (torch.ones(2, 3, dtype=torch.complex64), TypeError, "floating-point"),
            (torch.ones(2, 3, dtype=torch.bool), TypeError, "floating-point"),
            ([[1.0, 2.0]], TypeError, "floating-point"),
            (torch.ones(3), ValueError, r"\[K, N\]"),
            (torch.ones(2, 2, 2), ValueError, r"\[K, N\]"),
            (torch.ones(0, 3), ValueError, r"\[K, N\]"),
            (torch.ones(2, 0), ValueError, r"\[K, N\]"),
        ):
            with pytest.raises(error, match=message):
                VARIANTS[method]()(jacobian, torch.ones(2))

    @every_weighting
    def test_no_gramian(self, method):
        for gramian, error in (
            (torch.ones(2, 3), ValueError),
            (torch.ones(3), ValueError),
            (torch.ones(0, 0), ValueError),
            (torch.ones(2, 2, dtype=torch.int32), TypeError),
            ([[1.0]], TypeError),
        ):
            with pytest.raises(error, match="gramian"):
                VARIANTS[method]().weights(gramian, torch.ones(2))

    @every_method
    def test_losses_of_another_number(self, method):
        with pytest.raises(ValueError, match="one value per objective, 3, but got 2"):
            VARIANTS[method]()(torch.eye(3), torch.ones(2))
        with pytest.raises(ValueError, match=r"\[K\]"):
            VARIANTS[method]()(torch.eye(3), torch.ones(3, 1))

    @every_method
    def test_missing_losses(self, method):
        agg = VARIANTS[method]()
        if needs_losses(agg):
            with pytest.raises(TypeError, match="pass losses"):
                agg(torch.eye(3))

    def test_unknown_names_and_options_list_the_known_ones(self):
        with pytest.raises(ValueError, match=r"Unknown aggregator 'mgdaa'.*cagrad.*upgrad"):
            mogb.make("mgdaa")
        with pytest.raises(ValueError, match=r"'cagrad' has no option 'radius'. Its options: c, rescale"):
            mogb.make("cagrad", radius=1)

    @every_name
    def test_impossible_choices_list_the_possible_ones(self, name):
        for option, annotation in get_type_hints(get(name)).items():
            if get_origin(annotation) is Literal and option in option_names(get(name)):
                with pytest.raises(ValueError, match=option) as caught:
                    mogb.make(name, **{option: "nonsense"})
                assert all(str(value) in str(caught.value) for value in get_args(annotation))


def steps(agg, count, start=0, size=3):
    """Directions at a few different points, in a loop that gives the method what it needs."""
    found = []
    for step in range(start, start + count):
        losses = torch.linspace(0.5, 2.0, size, dtype=torch.float64) * (1 + step)
        agg.parameters()
        jacobian = random(size, 6, seed=step, conflict=0.5)
        found.append(agg(jacobian, losses if needs_losses(agg) else None))
        agg.update(0.9 * losses)
        if step % 3 == 2:
            agg.end_epoch()
    return found


def same_state(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(second[key])), key
        else:
            assert value == second[key], key


class TestState:
    pytestmark = pytest.mark.usefixtures("unchecked")

    @every_method
    @pytest.mark.parametrize("saved_at", [0, 3])
    def test_a_fresh_instance_goes_on_bit_for_bit(self, method, saved_at):
        agg, other = VARIANTS[method](), VARIANTS[method]()
        steps(agg, saved_at)
        steps(other, 2)  # whatever it did before is forgotten
        saved = agg.state_dict()
        assert all(isinstance(value, (torch.Tensor, int, float, bool, str)) for value in saved.values())
        other.load_state_dict(saved)
        for mine, theirs in zip(steps(agg, 9, saved_at), steps(other, 9, saved_at), strict=True):
            assert torch.equal(mine, theirs)
        same_state(agg.state_dict(), other.state_dict())

    @every_method
    def test_a_saved_state_is_a_snapshot(self, method):
        agg = VARIANTS[method]()
        steps(agg, 2)
        saved = agg.state_dict()
        snapshot = copy.deepcopy(saved)
        after = steps(agg, 3, 2)
        same_state(saved, snapshot)
        agg.load_state_dict(saved)
        for first, again in zip(after, steps(agg, 3, 2), strict=True):
            assert torch.equal(first, again)

    @every_method
    def test_a_reset_instance_is_a_fresh_one(self, method):
        agg = VARIANTS[method]()
        steps(agg, 3)
        agg.reset()
        same_state(agg.state_dict(), VARIANTS[method]().state_dict())
        for mine, fresh in zip(steps(agg, 3), steps(VARIANTS[method](), 3), strict=True):
            assert torch.equal(mine, fresh)

    @every_method
    def test_a_reset_instance_takes_another_number_of_objectives(self, method):
        agg = VARIANTS[method]()
        steps(agg, 2)
        agg.reset()
        assert steps(agg, 1, size=5)[0].isfinite().all()

    @every_method
    def test_unknown_keys_are_refused(self, method):
        agg = VARIANTS[method]()
        with pytest.raises(ValueError, match="nonsense"):
            agg.load_state_dict({"nonsense": 1.0})

    @every_method
    def test_the_state_survives_a_file(self, method, tmp_path):
        agg, other = VARIANTS[method](), VARIANTS[method]()
        steps(agg, 2)
        torch.save(agg.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(steps(agg, 1, 2)[0], steps(other, 1, 2)[0])

    @every_weighting
    def test_results_are_not_the_state(self, method):
        agg, twin = VARIANTS[method](), VARIANTS[method]()
        for step in range(3):
            jacobian = random(3, 6, seed=step)
            gramian, losses = jacobian @ jacobian.mT, losses_for(agg, 3)
            for other in (agg, twin):
                other.parameters()
            weights = agg.weights(gramian, losses)
            assert torch.equal(weights, twin.weights(gramian, losses))
            weights.fill_(1e9)  # a user may do as they like with what they got
            for other in (agg, twin):
                other.update(torch.ones(3, dtype=torch.float64))

    @every_method
    def test_draws_do_not_touch_the_global_generator(self, method):
        torch.manual_seed(1)
        np.random.seed(1)
        before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = steps(VARIANTS[method](), 2)
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == before_numpy).all()
        torch.manual_seed(2)
        for mine, again in zip(first, steps(VARIANTS[method](), 2), strict=True):
            assert torch.equal(mine, again)


class TestCard:
    @every_method
    def test_repr_names_the_options(self, method):
        agg = VARIANTS[method]()
        text = repr(agg)
        assert text.startswith(type(agg).__name__ + "(")
        assert all(f"{option}=" in text for option in option_names(type(agg)))
        assert "Generator" not in text

    @every_name
    def test_the_reference_can_be_cited(self, name):
        reference = get(name).reference
        assert isinstance(reference, Reference)
        assert reference.arxiv or reference.url
        entry = reference.bibtex(name)
        assert entry.startswith("@")
        assert entry.count("{") == entry.count("}")
        assert "and and" not in entry

    @every_name
    def test_it_reads_one_of_four_things(self, name):
        agg = mogb.make(name)
        assert isinstance(agg, Aggregator)
        assert agg.name == name
        assert agg.reads in ("losses", "gramian", "gramian+losses", "jacobian")

    @every_name
    def test_options_are_keywords(self, name):
        with pytest.raises(TypeError):
            get(name)("positional")
