"""The examples run, and are what they say; the benchmark made of them counts right, and resumes."""

import importlib
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import mogb
from mogb.compare.pool import Event

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ("multi_digits", "scaled_regression", "cartpole_rewards")

pytest.importorskip("sklearn", reason="the examples need scikit-learn: pip install 'mogb[dev]'")
pytest.importorskip("gymnasium", reason="the examples need gymnasium: pip install 'mogb[dev]'")


@pytest.fixture(scope="module", autouse=True)
def paths():
    """Examples and benchmarks are scripts, not a package."""
    added = [str(ROOT / "docs" / "examples"), str(ROOT / "benchmarks")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


def load(name):
    return importlib.import_module(name)


# --- the examples ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_its_table_and_draws_its_picture(name, tmp_path, capsys, unchecked):
    module = load(name)
    found = module.main(["--quick", "--methods", "weighted_sum,upgrad", "--out", str(tmp_path)])
    assert list(found)[1:] == ["weighted_sum", "upgrad"]
    assert all(set(metrics) == set(module.TASKS) for metrics in found.values())
    assert all(math.isfinite(value) for metrics in found.values() for value in metrics.values())
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert all(line.split()[0] in printed for line in found)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_method_trains(name, monkeypatch, unchecked):
    # All of these losses are positive, so that even ratios and logarithms exist.
    module = load(name)
    monkeypatch.setattr(module, "HORIZON", 30, raising=False)
    for method in mogb.registered():
        _, reports = module.train(mogb.make(method), steps=2)
        assert len(reports) == 2 * getattr(module, "INNER", 1)
        assert all(torch.isfinite(report.losses).all() for report in reports), method


@pytest.mark.parametrize("name", EXAMPLES)
def test_training_repeats_to_the_bit_and_follows_its_seed(name, unchecked):
    module = load(name)

    def metrics(seed):
        return module.evaluate(module.train(mogb.make("pcgrad"), seed=seed, steps=2)[0], seed=0)

    assert metrics(1) == metrics(1)
    assert metrics(1) != metrics(2)


def test_two_digits_are_overlaid_and_no_digit_is_in_two_splits():
    module = load("multi_digits")
    data = module.Digits(seed=3)
    parts = [set(part.tolist()) for part in data.splits.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    images, targets = data.draw("test", 64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 1, 11, 11)
    assert torch.equal(targets["sum"][:, 0], (targets["top left"] + targets["bottom right"]).float())
    # Where only one digit reaches, there must be one of that class in the test split that looks like this.
    pool = data.splits["test"]
    for image, label in zip(images[:, 0], targets["top left"], strict=True):
        candidates = data.images[pool[data.labels[pool] == label]]
        assert (candidates[:, :3] == image[:3, :8]).all(2).all(1).any()


def test_the_units_of_the_patients_spread_the_losses_by_ten_thousand():
    module = load("scaled_regression")
    data = module.Patients(seed=0)
    assert data.std.max() / data.std.min() > 1e4
    pressure, _, hdl, glucose = data.targets.mean(0).tolist()
    # Physiology: about 95 mmHg, 1.3 mmol/l and 0.9 g/l.
    assert 12_000 < pressure < 13_500
    assert 1.1 < hdl < 1.5
    assert 0.8 < glucose < 1.0
    model = module.Regressor(data.mean, data.std)
    rows = data.splits["train"]
    losses = module.losses_of(model(data.inputs[rows]), data.targets[rows])
    lengths = [
        torch.autograd.grad(loss, model.trunk[0].weight, retain_graph=True)[0].norm().item() for loss in losses.values()
    ]
    assert max(lengths) / min(lengths) > 1e3


def cartpole_batch(seed=0):
    module = load("cartpole_rewards")
    torch.manual_seed(seed)
    policy = module.make_policy()
    return module, policy, module.drive(policy, 8, seed)


def test_the_losses_of_cartpole_are_clipped_policy_gradients():
    module, policy, batch = cartpole_batch()
    with torch.no_grad():
        old = module.log_probability(policy, batch) + 0.3 * torch.randn(
            batch.actions.numel(), generator=torch.Generator().manual_seed(1)
        )
    losses = torch.einsum("kij,ij->k", module.coefficients_of(batch), module.terms_of(policy, batch, old))
    # PPO as it is printed: min(r A, clip(r) A), here with the ratio minus one.
    logits = policy(batch.states.flatten(0, 1))[:, 0]
    taken = torch.distributions.Bernoulli(logits=logits).log_prob(batch.actions.flatten())
    ratio = (taken - old).exp()
    advantages = module.advantages_of(batch).flatten(1)
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) - advantages
    expected = (1 - batch.rewards).mean((1, 2)) - clipped.mean(1)
    torch.testing.assert_close(losses, expected)
    with torch.no_grad():
        before = module.terms_of(policy, batch, module.log_probability(policy, batch))
    missed = torch.einsum("kij,ij->k", module.coefficients_of(batch), before)
    torch.testing.assert_close(missed, (1 - batch.rewards).mean((1, 2)))


def test_advantages_are_discounted_rewards_to_go_against_the_mean_of_the_carts():
    module, _, batch = cartpole_batch()
    later = batch.rewards.double().numpy()
    to_go = np.zeros_like(later)
    for t in range(module.HORIZON):
        powers = module.DISCOUNT ** np.arange(module.HORIZON - t)
        to_go[:, t] = np.einsum("s,ksb->kb", powers, later[:, t:])
    expected = (to_go - to_go.mean(2, keepdims=True)) * batch.alive.numpy() * (1 - module.DISCOUNT)
    np.testing.assert_allclose(module.advantages_of(batch).numpy(), expected, atol=1e-5)


def test_a_cart_that_fell_earns_nothing():
    _, _, batch = cartpole_batch()
    assert 0 < batch.alive.mean() < 1  # a policy that knows nothing falls, but not at once
    assert (batch.alive[1:] <= batch.alive[:-1]).all()
    assert (batch.rewards[:, batch.alive == 0] == 0).all()
    assert batch.rewards.min() >= 0
    assert batch.rewards.max() <= 1


def test_four_rewards_cost_one_backward_pass_and_agree_with_four(unchecked):
    module = load("cartpole_rewards")
    _, reports = module.train(mogb.make("mgda"), steps=2)
    assert [report.backward_passes for report in reports] == [2] + [1] * (2 * module.INNER - 1)  # one checks itself
    module, policy, batch = cartpole_batch()
    coefficients = module.coefficients_of(batch)
    with torch.no_grad():
        old = module.log_probability(policy, batch)
    losses = torch.einsum("kij,ij->k", coefficients, module.terms_of(policy, batch, old))
    mogb.backward(losses, policy, mogb.make("mgda"))
    expected = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    with module.PerSample(policy) as engine:
        engine.backward(module.terms_of(policy, batch, old), coefficients, mogb.make("mgda"), rows="keep")
    found = [parameter.grad for parameter in policy.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


# --- the benchmark ---

HIGHER = {"a": True, "b": False}


def record(method, seed, metrics, status="ok", reason=""):
    return {
        "problem": "digits", "method": method, "seed": seed, "status": status, "reason": reason, "metrics": metrics,
        "passes": 1.0, "uphill": None, "seconds": 1.0,
    }  # fmt: skip


def alone(seeds):
    return [
        record(f"alone:{task}", s, {task: value}) for s in range(seeds) for task, value in (("a", 50.0), ("b", 2.0))
    ]


def test_delta_m_by_hand():
    summary = load("_multitask_summary")
    # a: 60 for 50, higher is better: +20 %. b: 3 for 2, lower is better: -50 %. Mean -15 %.
    assert summary.changes({"a": 60.0, "b": 3.0}, {"a": 50.0, "b": 2.0}, HIGHER) == {"a": 20.0, "b": -50.0}
    (row,) = summary.summarize([*alone(1), record("weighted_sum", 0, {"a": 60.0, "b": 3.0})], HIGHER)
    assert row.delta.mean == pytest.approx(-15)
    assert math.isnan(row.delta.half)
    assert row.worst == ("b", pytest.approx(-50))


def test_holm_by_hand():
    # Holm (1979): sorted 0.01, 0.02, 0.03 times 3, 2, 1, kept monotone: 0.03, 0.04, 0.04.
    assert load("_multitask_summary").holm([0.02, float("nan"), 0.01, 0.03])[::2] == pytest.approx([0.04, 0.03])
    assert load("_multitask_summary").holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert load("_multitask_summary").holm([0.9, 0.8]) == [1.0, 1.0]


def test_intervals_and_tests_agree_with_scipy():
    summary = load("_multitask_summary")
    ours = [61.0, 66.0, 58.0, 70.0, 64.0]
    base = [52.0, 60.0, 55.0, 57.0, 60.0]
    records = alone(5)
    for seed in range(5):
        records.append(record("mgda", seed, {"a": ours[seed], "b": 2.0}))
        records.append(record("weighted_sum", seed, {"a": base[seed], "b": 2.0}))
    best, other = summary.summarize(records, HIGHER)
    assert (best.method, other.method) == ("mgda", "weighted_sum")
    values = 100 * (np.array(ours) - 50) / 50 / 2  # two tasks, one of them unchanged
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert best.delta.mean == pytest.approx(values.mean())
    assert best.delta.half == pytest.approx((high - low) / 2)
    assert best.p == pytest.approx(stats.ttest_rel(ours, base).pvalue)  # one comparison: nothing to correct
    assert best.verdict == "better"
    assert other.verdict == ""


def test_a_failed_run_fails_its_method_and_says_why():
    summary = load("_multitask_summary")
    records = [*alone(2), *(record("weighted_sum", s, {"a": 50.0, "b": 2.0}) for s in range(2))]
    records += [record("gls", 0, {"a": 90.0, "b": 1.0}), record("gls", 1, {}, "failed", "ValueError: negative")]
    rows = summary.summarize(records, HIGHER)
    assert [row.method for row in rows] == ["weighted_sum", "gls"]
    assert rows[1].delta is None
    assert rows[1].failure == "1 of 2 runs: ValueError: negative"
    found = summary.ranking({"digits": rows})
    assert found.overall[found.methods.index("gls")] == 2


def test_missing_runs_on_single_tasks_are_an_error():
    summary = load("_multitask_summary")
    records = [*alone(1)[:1], record("weighted_sum", 0, {"a": 50.0, "b": 2.0})]
    with pytest.raises(ValueError, match="lacks runs on single tasks"):
        summary.summarize(records, HIGHER)


def test_the_smallest_learning_rate_within_one_standard_error_is_chosen():
    choose = load("multitask").choose
    # The best mean is 5, with the standard error 1 / sqrt(3): bound 4.42.
    best = [4.0, 5.0, 6.0]
    assert choose({0.1: best, 0.01: [4.5, 4.5, 4.5], 0.001: [4.4, 4.4, 4.4]}) == 0.01
    assert choose({0.1: best, 0.01: [4.4, 4.4, 4.4], 0.001: [-9.0, 0.0, 9.0]}) == 0.1


def in_this_process(work, jobs, workers, done=None):
    """Instead of the pool, which has tests of its own."""
    for index, job in enumerate(jobs):
        yield Event(index, "done", work(job))
        if done is not None:
            done.append(job)


def test_a_method_that_refuses_is_a_record_that_says_why(monkeypatch, unchecked):
    runs = load("_multitask_runs")
    found = runs.run(runs.Job("regression", "krum(num_byzantine=3)", 0, "test", 1e-2, 1))
    assert found["status"] == "failed"
    assert found["metrics"] == {}
    assert "4" in found["reason"]  # objectives, of which three Byzantine ones leave too few


def test_a_lost_process_is_a_record_too(monkeypatch):
    benchmark, runs = load("multitask"), load("_multitask_runs")
    monkeypatch.setattr(benchmark, "run_jobs", lambda *rest: iter([Event(0, "lost", "killed")]))
    (found,) = benchmark._records([runs.Job("digits", "mgda", 0, "test", 1e-2, 1)], 1)
    assert (found["status"], found["reason"], found["method"]) == ("failed", "killed", "mgda")


def test_an_interrupted_benchmark_is_completed(tmp_path, monkeypatch, capsys, unchecked):
    benchmark = load("multitask")
    monkeypatch.setattr(benchmark, "run_jobs", in_this_process)
    words = ["multitask.py", "--quick", "--methods", "weighted_sum,mgda", "--problems", "regression", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path)])
    benchmark.main()
    log, table = tmp_path / "multitask.jsonl", tmp_path / "multitask.md"
    lines = log.read_text().splitlines()
    assert len(lines) == 2 * (4 + 2)  # two seeds, four tasks alone and two methods
    assert {"weighted_sum", "mgda"} <= {row["method"] for row in json.loads((tmp_path / "multitask.json").read_text())[
        "rows"]["regression"]}  # fmt: skip
    assert (tmp_path / "multitask.png").exists()
    first = [json.loads(line) for line in lines]
    log.write_text("\n".join(lines[:5]) + '\n{"problem": "regr')  # killed while it wrote
    done = []
    monkeypatch.setattr(benchmark, "run_jobs", lambda *rest: in_this_process(*rest, done=done))
    monkeypatch.setattr(sys, "argv", [*words, "--resume", "--out", str(tmp_path)])
    benchmark.main()
    assert len(done) == 12 - 5
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["metrics"] for r in sorted(again, key=str_of)] == [r["metrics"] for r in sorted(first, key=str_of)]
    assert "| mgda |" in table.read_text()
    assert "| mgda |" in capsys.readouterr().out


def str_of(found):
    return str((found["method"], found["seed"]))
