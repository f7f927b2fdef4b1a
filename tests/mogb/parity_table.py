"""Every reference case beside ours: ``python -m tests.mogb.parity_table`` prints the table.

``cases/aggregators.json`` holds directions computed with the official code of each method, and independent exact ones.
A case whose deviation is above the tolerance of its kind is an exception: it is listed here with the reason and with a
check that ours is the better answer. The later methods, problems and metrics are in ``parity_rest.py``.
"""

import dataclasses
import functools
import json
import math
import pathlib
import random

import numpy as np
import torch

import mogb
from mogb.aggregators.pcgrad import project
from mogb.base import needs_losses
from mogb.wrappers.logarithmic import Logarithmic
from mogb.wrappers.smoothed import Smoothed

try:
    from parity_rest import COMPARED, pairs, reason
except ImportError:  # started as python -m tests.mogb.parity_table
    from tests.mogb.parity_rest import COMPARED, pairs, reason

FILE = pathlib.Path(__file__).parents[1] / "cases" / "aggregators.json"
# By what computed the reference: float32 code in closed form, a numerical solver, or float64 to the last digits.
FLOAT32, SOLVER, EXACT = 1e-4, 1e-3, 1e-8
SOLVER_BASED = ("cagrad", "nash", "upgrad", "dualproj", "fairgrad", "crmogm")

LENGTHS = {
    "ProjectionLength": "projection_length",
    "TrackMinimum": "track_minimum",
    "TrackMaximum": "track_maximum",
    "TrackHarmonicAverage": "track_harmonic_average",
    "TrackArithmeticAverage": "track_arithmetic_average",
    "TrackGeometricAverage": "track_geometric_average",
}


@functools.cache
def reference():
    return json.loads(FILE.read_text())


@dataclasses.dataclass(frozen=True)
class Row:
    """One case beside ours."""

    id: str
    method: str
    matrix: str
    ours: str
    deviation: float  # relative to the reference's norm; NaN where the official code failed or returned NaN
    tolerance: float
    exception: str = ""  # why the reference is no target, where it is not

    @property
    def agrees(self):
        return self.deviation <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs of a case, and what is expected."""

    case: dict
    jacobian: torch.Tensor
    losses: torch.Tensor

    @property
    def settings(self):
        return self.case["settings"]

    @property
    def size(self):
        return len(self.jacobian)

    @property
    def gramian(self):
        return (self.jacobian @ self.jacobian.mT).numpy()

    @property
    def expected(self):
        """The direction; None where the official code raised an exception or returned NaN."""
        if self.case["expected_direction"] is None:
            return None
        direction = torch.tensor([float(value) for value in self.case["expected_direction"]], dtype=torch.float64)
        return direction if direction.isfinite().all() else None


def problem_of(case):
    matrix = reference()["matrices"][case["matrix"]]
    return Problem(
        case,
        torch.tensor(matrix["jacobian"], dtype=torch.float64),
        torch.tensor(matrix["losses_used"], dtype=torch.float64),
    )


def using(agg, factor=1.0):
    """Our direction, times the factor by which the official training loop differs from its own function."""
    return lambda problem: factor * agg(problem.jacobian, problem.losses if needs_losses(agg) else None)


def times_k(agg):
    return lambda problem: using(agg, problem.size)(problem)


def pcgrad_in(visits, factor=1.0):
    """PCGrad with given orders, one row for each objective."""
    visits = np.array(visits).T
    return lambda problem: factor * torch.from_numpy(project(problem.gramian, visits)) @ problem.jacobian


def shuffled_in_place(seed, size):
    """The orders of codes that shuffle one list of gradients again for every objective, with Python's generator."""
    generator, order, visits = random.Random(seed), list(range(size)), []
    for _ in range(size):
        generator.shuffle(order)
        visits.append(list(order))
    return visits


def drawn_by_torch(seed, size):
    """The orders of codes that draw a permutation for every objective."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=generator).tolist() for _ in range(size)]


def _cagrad(problem):
    s = problem.settings
    if "method" in s:
        return times_k(mogb.make("cagrad", c=s["c"]))
    return using(mogb.make("cagrad", c=s["alpha"], rescale=s["rescale"]))


def _fairgrad(problem):
    s = problem.settings
    if "method" in s:  # the training loop: K times the direction, clipped afterwards
        return times_k(mogb.make("fairgrad", alpha=s["alpha"], max_norm=s["max_norm"] / problem.size))
    return using(mogb.make("fairgrad", alpha=s["alpha"]))


def _mgda(problem):
    kind = problem.settings["normalization"]
    return times_k(mogb.make("mgda", normalization="l2" if kind == "norm" else kind, apply_to="raw"))


def _pcgrad(problem):
    s, size = problem.settings, problem.size
    averages = "Pytorch-PCGrad" in problem.case["source"]  # under both names of its reduction
    if isinstance(s.get("order"), list):
        return pcgrad_in([s["order"]] * size)
    if s.get("seed") == 0 or s.get("shuffle") == "seed0":
        return pcgrad_in(shuffled_in_place(0, size), 1 / size if averages else 1.0)
    return using(mogb.make("pcgrad", order="index", reduction="mean" if averages else "sum"))


def _log_mgda(problem):
    agg = Logarithmic(mogb.make("mgda"))
    weights = agg.weights(torch.from_numpy(problem.gramian), problem.losses)
    return using(agg, 1 / float(weights.sum()))  # the official loop brings the weights on the raw gradients to sum 1


def _upgrad(problem):
    return using(mogb.make("upgrad", preference=problem.settings.get("pref_vector")))


def _ones(problem):
    return mogb.make("weighted_sum", weights=[1.0] * problem.size)


OURS = {
    "ls": lambda p: using(_ones(p)),
    "libmtl_EW": lambda p: using(_ones(p)),
    "torchjd_Sum": lambda p: using(_ones(p)),
    "torchjd_Mean": lambda p: using(mogb.make("weighted_sum")),
    "toy_mean_grad": lambda p: using(mogb.make("weighted_sum")),
    "scaleinvls": lambda p: using(Logarithmic(_ones(p))),
    "rlw": lambda p: using(mogb.make("rlw", seed=0)),
    "libmtl_RLW": lambda p: using(mogb.make("rlw", seed=0)),
    "mgda": _mgda,
    "mgda_min_norm": lambda p: using(
        mogb.make("mgda", normalization=p.settings.get("normalization_type", "none"), apply_to="raw")
    ),
    "libmtl_MGDA": lambda p: using(mogb.make("mgda", normalization=p.settings["mgda_gn"], apply_to="normalized")),
    "toy_mgd": lambda p: using(mogb.make("mgda")),
    "torchjd_MGDA": lambda p: using(mogb.make("mgda")),
    "exact_mgda": lambda p: using(mogb.make("mgda")),
    "exact_mgda_l2_normalised_gradients": lambda p: using(mogb.make("mgda", normalization="l2")),
    "exact_mgda_l2_raw": lambda p: using(mogb.make("mgda", normalization="l2", apply_to="raw")),
    "log_mgda": _log_mgda,
    "pcgrad": _pcgrad,
    "libmtl_PCGrad": lambda p: using(mogb.make("pcgrad", order="index")),
    "toy_pcgrad": lambda p: using(mogb.make("pcgrad", order="index", reduction="mean")),
    "torchjd_PCGrad": lambda p: pcgrad_in(drawn_by_torch(0, p.size)),
    "exact_pcgrad_index_order": lambda p: using(mogb.make("pcgrad", order="index")),
    "cagrad": _cagrad,
    "libmtl_CAGrad": lambda p: using(mogb.make("cagrad", c=p.settings["calpha"], rescale=p.settings["rescale"])),
    "torchjd_CAGrad": lambda p: using(mogb.make("cagrad", c=p.settings["c"], rescale=0)),
    "toy_cagrad": lambda p: using(mogb.make("cagrad", c=p.settings["c"], rescale=2)),
    "mtrl_cagrad": lambda p: using(mogb.make("cagrad", c=p.settings["c"], rescale=1)),
    "mtrl_cagrad_exact": lambda p: _mtrl_exact(p),
    "mtrl_cagrad_fast": lambda p: using(mogb.make("cagrad", c=p.settings["c"], rescale=2)),
    "exact_cagrad": lambda p: using(mogb.make("cagrad", c=p.settings["c"], rescale=0)),
    "log_cagrad": lambda p: times_k(Logarithmic(mogb.make("cagrad", c=p.settings["c"]))),
    "nashmtl": lambda p: using(mogb.make("nash_mtl", max_norm=p.settings["max_norm"])),
    "libmtl_Nash_MTL": lambda p: using(mogb.make("nash_mtl", max_norm=p.settings["max_norm"])),
    "torchjd_NashMTL": lambda p: using(mogb.make("nash_mtl", max_norm=p.settings["max_norm"])),
    "fairgrad": _fairgrad,
    "libmtl_FairGrad": lambda p: using(mogb.make("fairgrad", alpha=p.settings["FairGrad_alpha"])),
    "torchjd_FairGrad": lambda p: using(mogb.make("fairgrad", alpha=p.settings["alpha"])),
    "exact_fairgrad": lambda p: using(mogb.make("fairgrad", alpha=p.settings["alpha"])),
    "imtl": lambda p: using(mogb.make("imtl_g")),
    "imtl_g": lambda p: using(mogb.make("imtl_g")),
    "libmtl_IMTL": lambda p: using(mogb.make("imtl_g")),
    "torchjd_IMTLG": lambda p: using(mogb.make("imtl_g")),
    "exact_imtl_g": lambda p: using(mogb.make("imtl_g")),
    "log_imtl": lambda p: using(Logarithmic(mogb.make("imtl_g"))),
    "aligned_mtl": lambda p: using(mogb.make("aligned_mtl", scale_mode=p.settings["scale_mode"])),
    "libmtl_Aligned_MTL": lambda p: using(mogb.make("aligned_mtl")),
    "torchjd_AlignedMTL": lambda p: using(
        mogb.make("aligned_mtl", scale_mode=p.settings["scale_mode"], reduction="mean")
    ),
    "exact_aligned_mtl": lambda p: using(mogb.make("aligned_mtl", scale_mode=p.settings["scale_mode"])),
    "torchjd_UPGrad": _upgrad,
    "libmtl_UPGrad": _upgrad,
    "exact_upgrad": _upgrad,
    "torchjd_DualProj": lambda p: using(mogb.make("dualproj")),
    "exact_dualproj": lambda p: using(mogb.make("dualproj")),
    "config": lambda p: using(mogb.make("config", length=LENGTHS[p.settings["length_model"]])),
    "config_double": lambda p: using(mogb.make("config")),
    "torchjd_ConFIG": lambda p: using(mogb.make("config")),
    "exact_config": lambda p: using(mogb.make("config")),
    "graddrop": lambda p: using(mogb.make("graddrop", seed=0)),
    "torchjd_GradDrop": lambda p: using(mogb.make("graddrop", seed=0)),
}
SEQUENCES = {"torchjd_CRMOGM_UPGrad_sequence": lambda s: Smoothed(mogb.make("upgrad"), decay=s["alpha"])}


def _mtrl_exact(problem):
    """The function divides d by 1 + lambda, the multiplier of the simplex weights."""
    agg = mogb.make("cagrad", c=problem.settings["c"], rescale=0)
    solution = agg.solve(torch.from_numpy(problem.gramian))
    multiplier = float(solution.weights.sum()) - 1
    return using(agg, 1 / (1 + multiplier))


def tolerance_of(case):
    if case["kind"] == "independent_exact":
        return EXACT
    return SOLVER if any(name in case["method"].lower() for name in SOLVER_BASED) else FLOAT32


def rows():
    """All comparisons, in the order of the file."""
    found = []
    for case in reference()["cases"]:
        if case["method"] in OURS:
            found.append(_compare(case))
        elif case["method"] in SEQUENCES:
            found.append(_compare_sequence(case))
        elif case["method"] == "torchjd_scalar_Mean":
            weights = mogb.make("weighted_sum").weights(losses=torch.tensor(case["settings"]["losses"]))
            deviation = float((weights - torch.tensor(case["expected_weights"])).norm())
            found.append(Row(case["id"], case["method"], "-", "weighted_sum", deviation, FLOAT32))
        elif case["method"] in COMPARED:
            found.append(_compare_pairs(case))
    return found


def unaccounted():
    """Reference methods that are compared nowhere."""
    known = {*OURS, *SEQUENCES, "torchjd_scalar_Mean", *COMPARED}
    return sorted({case["method"] for case in reference()["cases"]} - known)


def _compare_pairs(case):
    """The largest deviation of all pairs, each relative to the norm of the reference."""
    deviation = math.nan
    for ours, theirs in pairs(case, reference()["matrices"]):
        one, other = (torch.as_tensor(np.asarray(values, dtype=np.float64)) for values in (ours, theirs))
        gap = float((one - other).norm()) / (float(other.norm()) or 1.0)
        deviation = gap if math.isnan(deviation) else max(deviation, gap)
    steps = len(case.get("extra", {}).get("sequence", []))
    where = f"{steps} steps" if steps else case.get("matrix") or "-"
    row = Row(case["id"], case["method"], where, str(case["settings"]), deviation, FLOAT32)
    return row if row.agrees else dataclasses.replace(row, exception=reason(case))


def _compare(case):
    problem = problem_of(case)
    direction, expected = OURS[case["method"]](problem)(problem), problem.expected
    assert direction.isfinite().all()
    deviation = math.nan
    if expected is not None:
        scale = float(expected.norm()) or float(problem.jacobian.norm(dim=1).mean())
        deviation = float((direction - expected).norm()) / scale
    row = Row(case["id"], case["method"], case["matrix"], str(case["settings"]), deviation, tolerance_of(case))
    return row if row.agrees else dataclasses.replace(row, exception=explain(problem, direction))


def _compare_sequence(case):
    agg, deviation, conflicts, past = SEQUENCES[case["method"]](case["settings"]), 0.0, [], None
    for step in case["extra"]["sequence"]:
        jacobian = torch.tensor(step["jacobian"], dtype=torch.float64)
        expected, weights = (torch.tensor(step[key], dtype=torch.float64) for key in ("direction", "weights"))
        deviation = max(deviation, float((agg(jacobian) - expected).norm() / expected.norm()))
        decay = case["settings"]["alpha"]
        solved = weights if past is None else (weights - decay * past) / (1 - decay)  # what was averaged at this step
        direction = solved @ jacobian
        conflicts.append(float((jacobian @ direction / jacobian.norm(dim=1)).min() / direction.norm()))
        past = weights
    steps = f"{len(conflicts)} steps"
    row = Row(case["id"], case["method"], steps, str(case["settings"]), deviation, tolerance_of(case))
    wrong = not row.agrees and min(conflicts) < -1e-3
    return dataclasses.replace(row, exception="official ridge: the direction conflicts") if wrong else row


def explain(problem, direction):
    """Why the reference is no target, once the check that says so holds; empty if there is no such reason."""
    case, expected = problem.case, problem.expected
    method, zero_row = case["method"].lower(), bool((problem.jacobian == 0).all(dim=1).any())
    if expected is None:
        return f"official code raises {case['error'].split(':')[0]}" if case.get("error") else "official code gives NaN"
    for applies, reason, holds in (
        ("mgd" in method and zero_row, "official weights never reach 0 and 1", _is_shorter),
        ("imtl" in method and zero_row, "official code divides by a zero norm", _follows_the_live_row),
        ("mgda" in method, "official solver stops early", _is_shorter),
        ("nash" in method, "official solver fails and returns weights of 1, or stops early", _is_the_bargain),
        ("cagrad" in method and not expected.any(), "official code gives 0 where g_w = 0", _is_the_mean),
        ("cagrad" in method and zero_row, "convention: where g_w = 0, the mean gradient is not rescaled", _is_the_mean),
        ("cagrad" in method, "official solver stops early", _improves_the_worst_more),
        ("upgrad" in method or "dualproj" in method, "official ridge: the direction conflicts", _conflicts_less),
    ):
        if applies and holds(problem, direction, expected):
            return reason
    return ""


def _seen(problem):
    """The gradients that the method balances: those of the logarithms, for the variants on log losses."""
    logarithmic = problem.case["method"].startswith("log_")
    return problem.jacobian / problem.losses[:, None] if logarithmic else problem.jacobian


def _is_shorter(problem, direction, expected):
    """Both are points of the hull of the same vectors; the min-norm point is the shorter one."""
    rows = _seen(problem)
    exact = mogb.make("mgda").solve(rows @ rows.mT)
    theirs = expected
    if problem.case["expected_weights"] is not None:
        weights = torch.tensor(problem.case["expected_weights"], dtype=torch.float64)
        theirs = weights / weights.sum() @ rows
    return exact.residual <= 1e-9 and (torch.from_numpy(exact.weights) @ rows).norm() < theirs.norm()


def _follows_the_live_row(problem, direction, expected):
    live = problem.jacobian[(problem.jacobian != 0).any(dim=1)]
    return len(live) == 1 and bool(torch.allclose(direction / direction.norm(), live[0] / live[0].norm()))


def _is_the_bargain(problem, direction, expected):
    """G w = 1 / w holds for ours, on the rows that are not zero, and not for the official weights."""
    live = problem.gramian.diagonal() > 0
    gramian = problem.gramian[np.ix_(live, live)]

    def residual(weights):
        return float(np.abs(gramian @ weights * weights - 1).max())

    ours = mogb.make("nash_mtl", max_norm=0.0).solve(torch.from_numpy(problem.gramian)).weights[live]
    theirs = np.linalg.lstsq(problem.jacobian[live].numpy().T, expected.numpy(), rcond=None)[0]
    if problem.settings["max_norm"] > 0:  # undo the clip: at the bargain the squared norm is K
        theirs *= math.sqrt(live.sum() / (theirs @ gramian @ theirs))
    return residual(ours) <= 1e-8 and residual(theirs) > 1e-3


def _is_the_mean(problem, direction, expected):
    """Ours is the mean gradient, or K times it where the training loop multiplies; theirs is a multiple of it."""
    mean = _seen(problem).mean(dim=0)
    factor = float(direction @ mean / mean.square().sum())
    along = expected - float(expected @ mean / mean.square().sum()) * mean
    exact = (direction - factor * mean).norm() <= 1e-9 * direction.norm()
    return bool(exact) and round(factor, 9) in (1.0, problem.size) and bool(along.norm() <= 1e-6 * mean.norm())


def _improves_the_worst_more(problem, direction, expected):
    """CAGrad maximizes min_k g_k . d within |d - g_0| <= c |g_0|. No multiple of theirs inside does better."""
    c = next(problem.settings[key] for key in ("c", "alpha", "calpha") if key in problem.settings)
    rows, mean = problem.jacobian, problem.jacobian.mean(dim=0)
    ours = mogb.make("cagrad", c=c, rescale=0)(rows)
    inside = (ours - mean).norm() <= c * mean.norm() * (1 + 1e-9)
    multiples = [s * expected for s in np.linspace(0, 4, 4001)]
    feasible = [d for d in multiples if (d - mean).norm() <= c * mean.norm() * (1 + 1e-9)]
    return bool(inside) and all((rows @ d).min() < (rows @ ours).min() for d in feasible)


def _conflicts_less(problem, direction, expected):
    norms = problem.jacobian.norm(dim=1)
    ours = float(((problem.jacobian @ direction) / norms).min() / direction.norm())
    theirs = float(((problem.jacobian @ expected) / norms).min() / expected.norm())
    return ours >= -1e-12 and theirs < -1e-3


def summary(found):
    """The one line to publish."""
    agreeing = [row for row in found if row.agrees]
    worst = {
        kind: max((row.deviation for row in agreeing if row.tolerance == tolerance), default=0.0)
        for kind, tolerance in (("exact", EXACT), ("float32", FLOAT32), ("solver", SOLVER))
    }
    return (
        f"{len(found)} reference cases compared: {len(agreeing)} agree, {len(found) - len(agreeing)} exceptions. Worst "
        f"deviation where they agree: {worst['exact']:.1e} from exact solutions, {worst['float32']:.1e} from float32 "
        f"code, {worst['solver']:.1e} from numerical solvers."
    )


def main():
    found = rows()
    print(summary(found) + "\n")
    groups = {}
    for row in found:
        groups.setdefault((row.method, "" if row.agrees else row.exception or "UNEXPLAINED"), []).append(row)
    print(f"| {'reference':36} | cases | worst deviation | exception |\n|---|---|---|---|")
    for (method, reason), members in sorted(groups.items(), key=lambda item: (item[0][1] != "", item[0])):
        deviations = [row.deviation for row in members]
        worst = max(deviations) if not any(map(math.isnan, deviations)) else math.nan
        ids = " (" + ", ".join(row.id for row in members) + ")" if reason else ""
        print(f"| {method:36} | {len(members)} | {worst:.1e} | {reason}{ids} |")


if __name__ == "__main__":
    main()
