"""The reference cases of the later methods beside ours, for ``parity_table.py``: pairs of what we and they answer.

Every function takes a case and gives ``(ours, theirs)`` pairs: directions, weights, states, values, step after step.
``NO_TARGET`` says where there is nothing to compare with, and why; a test of ``test_parity_more.py`` or
``test_parity_losses.py`` proves each of these reasons.
"""

import numpy as np
import torch

import mogb
from mogb.aggregators.modo import cross_gramian
from mogb.jacobian import Jacobian
from mogb.metrics.conflict import condition_number, cosines, curvature, magnitude_similarity
from mogb.problems import make_problem

DOUBLE = torch.float64
# The official answer is not the right one, or there is none.
NO_TARGET = {
    "pmtl-004": "the official call returns 0 inside of the sector; ours goes on to descend",
    "pmtl-020": "the official call returns 0 inside of the sector; ours goes on to descend",
    "pmtl-006": "official weights never reach 0 and 1",
    "pmtl-016": "official weights never reach 0 and 1",
    "go4align": "official code raises NameError",
    "torchjd_ExcessMTL_sequence": "TorchJD updates the weights at the first call already; the official code does not",
}


def pairs(case, matrices):
    """What is to be compared; None for a method that is compared in ``parity_table.py``."""
    compare = COMPARED.get(case["method"])
    if compare is None:
        return None
    rows = None
    if case.get("matrix"):
        rows = torch.tensor(matrices[case["matrix"]]["jacobian"], dtype=DOUBLE)
    losses = None if case.get("losses") is None else torch.tensor(case["losses"], dtype=DOUBLE)
    return list(compare(case, rows, losses))


def reason(case):
    """Why the reference is no target; empty if it is."""
    return NO_TARGET.get(case["id"], NO_TARGET.get(case["method"], ""))


def _steps(case):
    for step in case["extra"]["sequence"]:
        found = [torch.tensor(step[key], dtype=DOUBLE) if key in step else None for key in ("jacobian", "losses")]
        yield step, *found


def _solved(make, detail=""):
    """Direction and weights of a method that yields them."""

    def compare(case, rows, losses):
        solution = make(case["settings"]).solve(rows @ rows.mT, losses)
        if case["expected_direction"] is not None:
            yield torch.from_numpy(solution.weights) @ rows, case["expected_direction"]
        if case["expected_weights"] is not None:
            yield solution.details[detail] if detail else solution.weights, case["expected_weights"]

    return compare


def _directed(make):
    """The direction alone: the weights that the official code reports are not the ones it uses, or none."""

    def compare(case, rows, losses):
        yield make(case["settings"])(rows, losses), case["expected_direction"]

    return compare


def _floats(values):
    return list(map(float, values))


def _epo(settings):
    return mogb.make("epo", preference=_floats(settings["r"]), eps=settings.get("eps", 1e-4))


def _epo_anchor(case, rows, losses):
    losses = torch.tensor(case["settings"]["l"], dtype=DOUBLE)
    details = _epo(case["settings"]).solve(torch.eye(len(losses), dtype=DOUBLE), losses).details
    yield details["anchor"], case["extra"]["a"]
    yield details["non_uniformity"], case["extra"]["mu_rl"]


def _ferero(case, rows, losses):
    rows = case["settings"]["gradient_scale"] * rows
    agg = mogb.make("ferero", preference=case["settings"]["pref"], normalize=False, solver="official")
    yield agg.weights(rows @ rows.mT, losses), case["expected_weights"]
    yield agg(rows, losses), case["expected_direction"]


def _pareto_mtl(init_steps):
    def make(settings):
        angles = np.linspace(0, np.pi / 2, settings["K"])
        references = np.column_stack([np.cos(angles), np.sin(angles)]).tolist()
        return mogb.make("pareto_mtl", references=references, index=settings["pref_index"], init_steps=init_steps)

    return make


def _three_batches(case, rows, losses):
    s = case["settings"]
    if case["method"] == "libmtl_MoDo":
        parts, agg = (1.0, 1.1, 0.9), mogb.make("modo", gamma=s["MoDo_gamma"], rho=s["MoDo_rho"])
    else:
        parts, agg = (1.1, 0.9, 1.0), mogb.make("sdmgrad", lam=s["SDMGrad_lamda"], solver="official", lr=5.0)
    first, second, third = (part * rows for part in parts)
    solution = agg.solve(cross_gramian(first, second))
    yield torch.from_numpy(solution.weights) @ third, case["expected_direction"]
    yield solution.details.get("simplex", solution.weights), case["expected_weights"]


def _gradvac(case, rows, losses):
    s = case["settings"]
    agg = mogb.make("gradvac", beta=s.get("GradVac_beta", s.get("beta")), order="index")
    for step, jacobian, _ in _steps(case):
        weights = agg.weights(jacobian @ jacobian.mT)
        yield weights @ jacobian, step["direction"]
        if case["method"].startswith("torchjd"):
            yield weights, step["weights"]


def _by_steps(make, weights=""):
    """Direction after direction, and a part of the state beside the reported weights."""

    def compare(case, rows, losses):
        agg = make(case["settings"])
        for step, jacobian, values in _steps(case):
            yield agg(jacobian, values), step["direction"]
            if weights:
                yield agg.state_dict()[weights], step["weights"]

    return compare


def _excess_mtl(case, rows, losses):
    agg = mogb.make(
        "excess_mtl", step_size=case["settings"]["robust_step_size"], simplex=case["method"].startswith("torchjd")
    )
    for step, jacobian, _ in _steps(case):
        direction, _, solution = agg.direct(Jacobian.of(jacobian), None)
        yield solution.weights, step["weights"]
        yield direction[0], step["direction"]


def _stch(case, rows, losses):
    agg = mogb.make("stch", mu=case["settings"]["STCH_mu"], warmup_epochs=case["settings"]["STCH_warmup_epoch"])
    for epoch in range(case["settings"]["STCH_warmup_epoch"]):
        agg.weights(losses=losses + epoch + 1.0)
        agg.end_epoch()
    agg.weights(losses=losses)
    agg.end_epoch()
    factors = torch.arange(1, len(losses) + 1, dtype=DOUBLE)
    yield agg(factors[:, None] * rows, factors * losses), case["expected_direction"]


def _dwa_epochs(case, rows, losses):
    agg = mogb.make("dwa", temperature=case["settings"]["T"])
    for mean in torch.tensor(case["settings"]["train_loss_buffer"], dtype=DOUBLE).mT[: case["settings"]["epoch"]]:
        agg.weights(losses=mean)
        agg.end_epoch()
    yield agg.weights(losses=losses), case["expected_weights"]
    yield agg(rows, losses), case["expected_direction"]


def _dwa_windows(case, rows, losses):
    agg = mogb.make("dwa", temperature=case["settings"]["temp"], window=case["settings"]["iteration_window"])
    for step, _, values in _steps(case):
        yield agg.weights(losses=values), step["weights"]


def _famo(case, rows, losses):
    scales = torch.tensor([1.0, 10.0, 0.1], dtype=DOUBLE)
    centers = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, -1.0]], dtype=DOUBLE)
    x = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    agg = mogb.make("famo", lr=case["settings"]["w_lr"], weight_decay=case["settings"]["gamma"])
    for step, _, _ in _steps(case):
        direction = agg(2 * scales[:, None] * (x - centers), scales * (x - centers).square().sum(1) + 0.1)
        yield direction, step["grad"]
        x = x - 0.1 * direction
        agg.update(scales * (x - centers).square().sum(1) + 0.1)
        yield x, step["x_after"]
        yield agg.state_dict()["logits"], step["w_after"]


def _famo_states(case, rows, losses):
    agg = mogb.make("famo", lr=case["settings"]["lr"], weight_decay=case["settings"]["weight_decay"])
    for step in case["extra"]["sequence"]:
        agg.solve(losses=torch.tensor(step["losses_before"]))
        agg.update(torch.tensor(step["losses_after"]))
        yield agg.state_dict()["logits"], step["state"]["_w"]


def _trimmed_mean(case, rows, losses):
    agg = mogb.make("trimmed_mean", trim=case["settings"]["trim_number"])
    if "error" not in case:
        yield agg(rows), case["expected_direction"]
        return
    try:
        agg(rows)
    except ValueError:
        yield [1.0], [1.0]  # both refuse
    else:
        yield [0.0], [1.0]


def _scalarization(make):
    def compare(case, rows, losses):
        values = torch.tensor(case["settings"]["losses"], dtype=DOUBLE)
        solution = make(case["settings"]).solve(losses=values)
        yield solution.weights, case["expected_weights"]
        yield (
            [solution.weights @ values.numpy() if solution.value is None else solution.value],
            [case["extra"]["value"]],
        )

    return compare


def _toy(case, rows, losses):
    problem = make_problem("valley")
    for point in case["extra"]["points"]:
        values, jacobian = problem.jacobian(torch.tensor([point["x"]], dtype=DOUBLE))
        yield values[0], point["f"]
        yield jacobian[0], point["jacobian_rows_are_tasks"]


def _fonseca(case, rows, losses):
    problem = make_problem("fonseca")
    for point in case["extra"]["points"]:
        values, jacobian = problem.jacobian(torch.tensor([point["x"]], dtype=DOUBLE))
        yield values[0], point["f"]
        yield jacobian[0], point["df"]


def _metrics(case, rows, losses):
    found = {"cos": cosines, "gms": magnitude_similarity, "cbm": curvature}
    live = np.flatnonzero((rows != 0).any(1).numpy())  # their numbers for a zero gradient are NaN
    among = np.ix_(live, live)
    for name, metric in found.items():
        yield metric(rows)[among], np.array(case["extra"][name], dtype=float)[among]
    yield [condition_number(rows)], [case["extra"]["cn"]]


def _moco(settings):
    names = ("beta", "beta_sigma", "gamma", "gamma_sigma", "rho")
    return mogb.make("moco", **{name: float(settings[f"MoCo_{name}"]) for name in names})


def _db_mtl(settings):
    return mogb.make("db_mtl", **{name: float(settings[f"DB_{name}"]) for name in ("beta", "beta_sigma")})


COMPARED = {
    "epo": _solved(_epo),
    "epo_adjustments": _epo_anchor,
    "ferero": _ferero,
    "paretomtl": _solved(_pareto_mtl(0)),
    "paretomtl_init": _directed(_pareto_mtl(1)),
    "sdmgrad": _solved(lambda s: mogb.make("sdmgrad", lam=s["lamda"], solver="official"), "simplex"),
    "toy_sdmgrad": _solved(lambda s: mogb.make("sdmgrad", lam=s["lmbda"])),
    "torchjd_SDMGrad": _solved(lambda s: mogb.make("sdmgrad", lam=s["lambda_"], solver="official")),
    "torchjd_MoDo": _solved(lambda s: mogb.make("modo", gamma=s["gamma"], rho=s["rho"])),
    "torchjd_GradVac": _solved(lambda s: mogb.make("gradvac", beta=s["beta"], seed=s["seed"])),
    "torchjd_PCD": _solved(lambda s: mogb.make("pcd", tau=s["tau"], beta=s["beta"], eps=s["eps"])),
    "libmtl_MoDo": _three_batches,
    "libmtl_SDMGrad": _three_batches,
    "libmtl_GradVac_sequence": _gradvac,
    "torchjd_GradVac_sequence": _gradvac,
    "uw": _directed(lambda s: mogb.make("uw")),
    "libmtl_UW": _directed(lambda s: mogb.make("uw", init=-0.5)),
    "libmtl_GLS": _directed(lambda s: mogb.make("gls")),
    "libmtl_STCH": _stch,
    "libmtl_DWA": _dwa_epochs,
    "dwa": _dwa_windows,
    "famo": _directed(lambda s: mogb.make("famo")),
    "libmtl_FAMO": _directed(lambda s: mogb.make("famo")),
    "famo_sequence": _famo,
    "torchjd_scalar_FAMO_sequence": _famo_states,
    "libmtl_DB_MTL": _directed(_db_mtl),
    "libmtl_DB_MTL_sequence": _by_steps(_db_mtl),
    "libmtl_MoCo": _directed(_moco),
    "libmtl_MoCo_sequence": _by_steps(_moco, "simplex"),
    "libmtl_ExcessMTL_sequence": _excess_mtl,
    "torchjd_ExcessMTL_sequence": _excess_mtl,
    "go4align": lambda case, rows, losses: (),
    "torchjd_TrimmedMean": _trimmed_mean,
    "torchjd_scalar_GeometricMean": _scalarization(lambda s: mogb.make("gls")),
    "torchjd_scalar_IMTLL": _scalarization(lambda s: mogb.make("imtl_l")),
    "torchjd_scalar_PBI": _scalarization(lambda s: mogb.make("pbi", theta=s["theta"], preference=s["weights"])),
    "torchjd_scalar_STCH": _scalarization(
        lambda s: mogb.make("stch", mu=s["mu"], preference=s["weights"], ideal=s["reference"])
    ),
    "toy_problem_values": _toy,
    "vlmop2_values": _fonseca,
    "mtl_metrics": _metrics,
}
