import cmath

import numpy as np
import pytest
import torch

from mogb.compare import Plan
from mogb.compare.loop import RunFailed, follow, marks_of, starts_of
from mogb.compare.optimizers import make_optimizer
from mogb.problems import make_problem

STEPS = 2000


def valley(x1, x2, scales):
    """The two losses of CAGrad's toy at complex points, from its published formula."""

    def positive(z):  # max(z, 0), and z at z = 0, as torch.clamp has it
        return z if z.real >= 0 else 0.0

    def log(z):
        z = z if z.real >= 0 else -z
        return cmath.log(z if z.real > 5e-6 else 5e-6)

    h1 = log(0.5 * (-x1 - 7) - cmath.tanh(-x2)) + 6
    h2 = log(0.5 * (-x1 + 3) + cmath.tanh(-x2) + 2) + 6
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = positive(cmath.tanh(0.5 * x2)), positive(cmath.tanh(-0.5 * x2))
    return (h1 * c1 + q1 * c2) * scales[0], (h2 * c1 + q2 * c2) * scales[1]


def gradients(x, scales, h=1e-30):
    """By complex steps, exact to rounding."""
    first, second = valley(x[0] + 1j * h, complex(x[1]), scales), valley(complex(x[0]), x[1] + 1j * h, scales)
    return np.array([[one.imag / h, two.imag / h] for one, two in zip(first, second, strict=True)])


def mean(g):
    return g.mean(0)


def shortest(g):
    """The closed form of Sener and Koltun for two gradients."""
    a, b = g
    if a @ b >= a @ a:
        return a
    if a @ b >= b @ b:
        return b
    t = ((b - a) @ b) / ((a - b) @ (a - b))
    return t * a + (1 - t) * b


def projected(g):
    """PCGrad with its sum; for two objectives there is only one order."""
    a, b = g
    if a @ b >= 0:
        return a + b
    return a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a


def by_hand(start, direction, scales):
    x, m, v = np.array(start), np.zeros(2), np.zeros(2)
    for t in range(1, STEPS + 1):
        d = direction(gradients(x.tolist(), scales))
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d**2
        x = x - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


@pytest.mark.parametrize(("method", "direction"), [("weighted_sum", mean), ("mgda", shortest), ("pcgrad", projected)])
def test_two_starts_of_the_valley_end_where_a_plain_loop_ends(method, direction):
    plan = Plan((method,), ("valley_scaled",), steps=STEPS)
    ends = follow(plan.runs()[0], plan, make_problem("valley_scaled")).positions[-1]
    for index, start in ((0, [-8.5, 7.5]), (4, [9.0, -1.0])):
        np.testing.assert_allclose(ends[index], by_hand(start, direction, (0.1, 1.0)), atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_optimizers_are_those_of_torch(name):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 4))
    theirs = torch.nn.Parameter(torch.from_numpy(x.copy()))
    other = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]([theirs], lr=0.05)
    ours = make_optimizer(name, 0.05, x.shape)
    for _ in range(50):
        direction = generator.normal(size=x.shape)
        x = x - ours(direction)
        theirs.grad = torch.from_numpy(direction)
        other.step()
    np.testing.assert_allclose(x, theirs.detach().numpy(), rtol=1e-12)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'lion'.*adam, sgd"):
        make_optimizer("lion", 0.1, (1, 1))


def test_kept_steps_begin_with_the_start_and_end_with_the_last_step():
    assert marks_of(1) == [0, 1]
    assert marks_of(7) == list(range(8))
    marks = marks_of(50_000)
    assert marks[:6] == [0, 1, 2, 3, 4, 5]
    assert marks[-1] == 50_000
    assert len(marks) < 250
    assert max(np.diff(marks)) <= 50_000 / 100


def test_seed_zero_is_the_published_starts_and_others_are_random_but_the_same_for_everyone():
    problem = make_problem("valley")
    np.testing.assert_array_equal(starts_of(problem, 0), problem.starts().numpy())
    np.testing.assert_array_equal(starts_of(problem, 1), starts_of(problem, 1))
    assert not np.allclose(starts_of(problem, 1), starts_of(problem, 2))


def test_conflicts_of_a_weighted_sum_are_counted_by_hand():
    # Gradients of (x1^2, x2^2) never conflict with their sum; on the scaled pair of bowls they do.
    plan = Plan(("weighted_sum",), ("quadratic_elementwise", "quadratic_scaled"), steps=20)
    calm, torn = (follow(run, plan, make_problem(run.problem)) for run in plan.runs())
    assert calm.observer.summary()["conflict_rate"] == [0.0] * 5
    problem, rates = make_problem("quadratic_scaled"), []
    for start in range(4):
        x = problem.starts()[start : start + 1]
        hits, smallest = 0, []
        for _ in range(20):
            _, rows = problem.jacobian(x)
            d = rows[0].mean(0)
            cosine = torch.nn.functional.cosine_similarity(rows[0], d[None])
            hits += bool(cosine.min() < 0)
            smallest.append(float(cosine.min()))
            x = x - problem.settings.lr * d
        rates.append((hits / 20, np.mean(smallest), min(smallest)))
    found = torn.observer.summary()
    expected = [list(column) for column in zip(*rates, strict=True)]
    assert any(0 < rate < 1 for rate in expected[0])
    np.testing.assert_allclose(found["conflict_rate"], expected[0])
    np.testing.assert_allclose(found["cosine_min"], expected[1])
    np.testing.assert_allclose(found["cosine_worst"], expected[2])


def test_min_norm_directions_conflict_with_no_gradient_of_their_own_batch_but_with_exact_ones():
    plan = Plan(("mgda",), ("specialists",), steps=60)
    path = follow(plan.runs()[0], plan, make_problem("specialists"))
    assert max(path.observer.summary()["conflict_rate"]) == 0
    assert min(path.held_out.summary()["conflict_rate"]) > 0.2


def test_a_step_without_direction_counts_neither_for_nor_against_a_method():
    # From (0, -3), the first gradient is zero: the min-norm point is 0, and nothing ever moves.
    plan = Plan(("mgda",), ("quadratic_elementwise",), steps=10)
    path = follow(plan.runs()[0], plan, make_problem("quadratic_elementwise"))
    found = path.observer.summary()
    np.testing.assert_array_equal(path.positions[-1][1], [0.0, -3.0])
    assert found["counted_steps"][1] == 0
    assert found["conflict_rate"][1] is None
    assert found["counted_steps"][0] > 0


def test_weight_shares_are_those_of_the_weights():
    plan = Plan(("weighted_sum(weights=[1.0,3.0])",), ("valley",), steps=300)
    shares = follow(plan.runs()[0], plan, make_problem("valley")).observer.summary()["weights_over_time"]
    np.testing.assert_allclose(shares, [[0.25, 0.75]] * 60)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_and_inf_end_a_run_with_step_start_and_objective(monkeypatch, bad, what):
    problem = make_problem("valley")
    exact, calls = type(problem).jacobian, []

    def broken(self, x, generator=None):
        losses, rows = exact(self, x, generator)
        calls.append(1)
        if len(calls) == 3:
            (losses if what == "loss" else rows[:, :, 0])[2, 1] = bad
        return losses, rows

    monkeypatch.setattr(type(problem), "jacobian", broken)
    plan = Plan(("mgda",), ("valley",), steps=5)
    with pytest.raises(RunFailed, match=rf"step 3, start 2: The {what} of objective 1 holds NaN or Inf"):
        follow(plan.runs()[0], plan, problem)


def test_divergence_is_a_failure_and_not_a_number():
    plan = Plan(("weighted_sum(weights=[1e200,1e200])",), ("quadratic_elementwise",), steps=50)
    with pytest.raises(RunFailed, match=r"step \d+.*"), np.errstate(all="ignore"):
        follow(plan.runs()[0], plan, make_problem("quadratic_elementwise"))


def test_a_method_that_wants_losses_after_the_step_gets_those_of_the_same_batch(monkeypatch):
    problem, seen = make_problem("specialists"), []
    famo = pytest.importorskip("mogb.aggregators.famo").FAMO
    update = famo._update
    monkeypatch.setattr(famo, "_update", lambda self, losses: (seen.append(losses), update(self, losses))[1])
    plan = Plan(("famo(min_losses=[-200.0,-50.0,-10.0,-3.0])",), ("specialists",), steps=4)
    path = follow(plan.runs()[0], plan, problem)
    assert len(seen) == 4 * len(problem.starts())
    assert path.marks == [0, 1, 2, 3, 4]
    generator = torch.Generator()
    from mogb.compare.plan import derived_seed

    generator.manual_seed(derived_seed("noise", "specialists", 0))
    again, _ = problem.jacobian(torch.from_numpy(path.positions[1]), generator)
    np.testing.assert_allclose(np.stack(seen[:3]), again.numpy())
