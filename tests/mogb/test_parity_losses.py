"""The reference cases of the methods that read losses or whole Jacobians: what official codes answered, case by case.

Every case is compared, or its disagreement is explained by a test of its own. Official codes ran in float32, so that
their tolerance is 1e-4, relative to the largest number of the answer.
"""

import json
import pathlib

import numpy as np
import pytest
import torch

import mogb

DATA = json.loads((pathlib.Path(__file__).parents[1] / "cases" / "aggregators.json").read_text())
METHODS = (
    "uw", "scaleinvls", "famo", "famo_sequence", "dwa", "go4align", "libmtl_UW", "libmtl_GLS", "libmtl_STCH",
    "libmtl_DWA", "libmtl_FAMO", "libmtl_DB_MTL", "libmtl_MoCo", "libmtl_MoCo_sequence", "libmtl_DB_MTL_sequence",
    "libmtl_ExcessMTL_sequence", "torchjd_ExcessMTL_sequence", "torchjd_TrimmedMean", "torchjd_scalar_Mean",
    "torchjd_scalar_GeometricMean", "torchjd_scalar_STCH", "torchjd_scalar_PBI", "torchjd_scalar_IMTLL",
    "torchjd_scalar_FAMO_sequence",
)  # fmt: skip
CASES = {case["id"]: case for case in DATA["cases"] if case["method"] in METHODS}
TOLERANCE = 1e-4


def cases(*methods):
    found = [case for case in CASES.values() if case["method"] in methods]
    assert found
    return pytest.mark.parametrize("case", found, ids=lambda case: case["id"])


def jacobian_of(case):
    return torch.tensor(DATA["matrices"][case["matrix"]]["jacobian"], dtype=torch.float64)


def losses_of(case):
    return torch.tensor(case["losses"], dtype=torch.float64)


def same(ours, official, tolerance=TOLERANCE):
    ours, official = (np.asarray(values, dtype=np.float64) for values in (ours, official))
    assert ours.shape == official.shape
    scale = max(np.abs(official).max(), 1e-30)
    assert np.abs(ours - official).max() / scale < tolerance, (ours, official)


def same_direction(method, case):
    same(method(jacobian_of(case), losses_of(case)), case["expected_direction"])


def steps_of(case):
    for step in case["extra"]["sequence"]:
        jacobian = torch.tensor(step["jacobian"], dtype=torch.float64) if "jacobian" in step else None
        losses = torch.tensor(step["losses"], dtype=torch.float64) if "losses" in step else None
        yield step, jacobian, losses


def test_no_case_is_left_out():
    """A method that is added to the file must be added here or where the other methods are compared."""
    assert len(CASES) == 53
    compared = {case["method"] for case in DATA["cases"]} & set(METHODS)
    assert compared == set(METHODS)
    mine = ("uw", "dwa", "famo", "go4", "gls", "stch", "moco", "db_mtl", "excess", "trimmed", "scalar", "imtll")
    forgotten = [
        case["method"]
        for case in DATA["cases"]
        if any(word in case["method"].lower() for word in mine) and case["method"] not in METHODS
    ]
    assert not forgotten


@cases("uw")
def test_uw_of_nash_mtl(case):
    method = mogb.make("uw")
    same_direction(method, case)
    # Their log has exp(-s), without the one half that their loss has.
    same(2 * method.weights(losses=losses_of(case)) if method.parameters() else None, case["expected_weights"])


@cases("libmtl_UW")
def test_uw_of_libmtl(case):
    same_direction(mogb.make("uw", init=-0.5), case)
    same(mogb.make("uw", init=-0.5).weights(losses=losses_of(case)), case["expected_weights"])


@cases("scaleinvls")
def test_si_of_nash_mtl(case):
    same_direction(mogb.make("si"), case)
    assert set(case["expected_weights"]) == {1.0}  # their log has the coefficients of the logarithms


@cases("libmtl_GLS")
def test_gls_of_libmtl(case):
    losses = losses_of(case)
    same_direction(mogb.make("gls"), case)
    # The weights that LibMTL reports are not those it uses: it divides the losses by K times their product.
    same(losses / (len(losses) * losses.prod()), case["expected_weights"])


@cases("libmtl_STCH")
def test_stch_of_libmtl(case):
    losses = losses_of(case)
    method = mogb.make("stch", mu=case["settings"]["STCH_mu"], warmup_epochs=case["settings"]["STCH_warmup_epoch"])
    for epoch in range(case["settings"]["STCH_warmup_epoch"]):
        method.weights(losses=losses + epoch + 1.0)  # these epochs do not count
        method.end_epoch()
    method.weights(losses=losses)
    method.end_epoch()
    factors = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    same(method(factors[:, None] * jacobian_of(case), factors * losses), case["expected_direction"])


@cases("libmtl_DWA")
def test_dwa_of_libmtl(case):
    method = mogb.make("dwa", temperature=case["settings"]["T"])
    epochs = torch.tensor(case["settings"]["train_loss_buffer"], dtype=torch.float64).mT
    for mean in epochs[: case["settings"]["epoch"]]:
        for losses in (0.5 * mean, 1.5 * mean):
            method.weights(losses=losses)
        method.end_epoch()
    same(method.weights(losses=losses_of(case)), case["expected_weights"])
    same_direction(method, case)


@cases("dwa")
def test_dwa_of_nash_mtl(case):
    method = mogb.make("dwa", temperature=case["settings"]["temp"], window=case["settings"]["iteration_window"])
    for step, _, losses in steps_of(case):
        weights = method.weights(losses=losses)
        same(weights, step["weights"])
        same((weights * losses).mean(), step["loss"])  # they take the mean where the paper has the sum


@cases("famo", "libmtl_FAMO")
def test_the_first_step_of_famo(case):
    same_direction(mogb.make("famo"), case)
    if case["expected_weights"] is not None:  # they log the shares, which are uniform at first
        assert len(set(case["expected_weights"])) == 1


@cases("famo_sequence")
def test_famo_of_its_authors(case):
    scales = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    centers = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def losses_at(x):
        return scales * (x - centers).square().sum(1) + 0.1

    method = mogb.make("famo", lr=case["settings"]["w_lr"], weight_decay=case["settings"]["gamma"])
    for step, _, _ in steps_of(case):
        losses = losses_at(x)
        same(losses, step["losses"])
        gradients = 2 * scales[:, None] * (x - centers)
        solution = method.solve(losses=losses)
        same(solution.value, step["famo_loss"])
        direction = torch.from_numpy(solution.weights) @ gradients
        same(direction, step["grad"])
        x = x - 0.1 * direction
        same(x, step["x_after"])
        method.update(losses_at(x))
        same(method.state_dict()["logits"], step["w_after"])


@cases("torchjd_scalar_FAMO_sequence")
def test_famo_of_torchjd(case):
    method = mogb.make("famo", lr=case["settings"]["lr"], weight_decay=case["settings"]["weight_decay"])
    for step in case["extra"]["sequence"]:
        solution = method.solve(losses=torch.tensor(step["losses_before"]))
        # Their value is a difference of logarithms near zero: absolute float32 accuracy is all there is.
        assert solution.value == pytest.approx(step["value"], abs=1e-6)
        method.update(torch.tensor(step["losses_after"]))
        same(method.state_dict()["logits"], step["state"]["_w"])


@cases("go4align")
def test_go4align_cannot_run_as_published(case):
    """There is no number to compare with: see test_go4align.py for an independent computation."""
    assert case["error"] == "NameError: name 'kmeans' is not defined"
    assert case["expected_weights"] is case["expected_direction"] is None


def db_mtl_of(case):
    return mogb.make("db_mtl", **{name: float(case["settings"][f"DB_{name}"]) for name in ("beta", "beta_sigma")})


@cases("libmtl_DB_MTL")
def test_the_first_step_of_db_mtl(case):
    same_direction(db_mtl_of(case), case)
    assert set(case["expected_weights"]) == {1.0}  # a constant, not a result


@cases("libmtl_DB_MTL_sequence")
def test_db_mtl(case):
    method = db_mtl_of(case)
    for step, jacobian, losses in steps_of(case):
        same(method(jacobian, losses), step["direction"])


def moco_of(case):
    names = ("beta", "beta_sigma", "gamma", "gamma_sigma", "rho")
    return mogb.make("moco", **{name: float(case["settings"][f"MoCo_{name}"]) for name in names})


@cases("libmtl_MoCo")
def test_the_first_step_of_moco(case):
    method = moco_of(case)
    same_direction(method, case)
    same(method.state_dict()["simplex"], case["expected_weights"])


@cases("libmtl_MoCo_sequence")
def test_moco(case):
    method = moco_of(case)
    for step, jacobian, losses in steps_of(case):
        same(method(jacobian, losses), step["direction"])
        same(method.state_dict()["simplex"], step["weights"])


@cases("libmtl_ExcessMTL_sequence")
def test_excess_mtl_of_libmtl(case):
    method = mogb.make("excess_mtl", step_size=case["settings"]["robust_step_size"])
    for step, jacobian, _ in steps_of(case):
        direction, _, solution = method.direct(mogb.jacobian.Jacobian.of(jacobian), None)
        same(solution.weights, step["weights"])
        same(direction[0], step["direction"])


@cases("torchjd_ExcessMTL_sequence")
def test_excess_mtl_of_torchjd_but_for_its_first_update(case):
    """TorchJD updates the weights already at the first call, with the raw excess risks; the official code does not.

    Every later factor is the same, so that the ratio to the first weights is what this method answers.
    """
    method = mogb.make("excess_mtl", step_size=case["settings"]["robust_step_size"], simplex=True)
    first = None
    for step, jacobian, _ in steps_of(case):
        theirs = np.array(step["weights"])
        _, _, solution = method.direct(mogb.jacobian.Jacobian.of(jacobian), None)
        if first is None:
            first = theirs
            excess = jacobian.abs() / (1 + 1e-7 / jacobian.square()).sqrt()
            same(torch.softmax(excess.sum(1), 0), first)
        mixed = first * solution.weights
        same(mixed / mixed.sum(), theirs)
        same(theirs @ jacobian.numpy(), step["direction"])


@cases("torchjd_TrimmedMean")
def test_trimmed_mean_of_torchjd(case):
    method, jacobian = mogb.make("trimmed_mean", trim=case["settings"]["trim_number"]), jacobian_of(case)
    if "error" in case:
        assert "at least 3 rows" in case["error"]
        with pytest.raises(ValueError, match="at least 3 gradients"):
            method(jacobian)
    else:
        same(method(jacobian), case["expected_direction"])


@cases(
    "torchjd_scalar_Mean", "torchjd_scalar_GeometricMean", "torchjd_scalar_STCH", "torchjd_scalar_PBI",
    "torchjd_scalar_IMTLL",
)  # fmt: skip
def test_scalarizations_of_torchjd(case):
    settings = case["settings"]
    method = {
        "Mean": lambda: mogb.make("weighted_sum"),
        "GeometricMean": lambda: mogb.make("gls"),
        "STCH": lambda: mogb.make(
            "stch", mu=settings["mu"], preference=settings["weights"], ideal=settings["reference"]
        ),
        "PBI": lambda: mogb.make("pbi", theta=settings["theta"], preference=settings["weights"]),
        "IMTLL": lambda: mogb.make("imtl_l"),
    }[case["method"].removeprefix("torchjd_scalar_")]()
    losses = torch.tensor(settings["losses"], dtype=torch.float64)
    solution = method.solve(losses=losses)
    same(solution.weights, case["expected_weights"])
    value = solution.weights @ losses.numpy() if solution.value is None else solution.value  # linear: the same
    same(value, case["extra"]["value"])
