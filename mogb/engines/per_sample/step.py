"""What a call of the engine is made of: the plan, the report, and the checks of what it is given.

Shapes: K = objectives, B = samples, J = terms, R = passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mogb.engines.per_sample.passes import Passes
from mogb.engines.per_sample.problem import Problem
from mogb.engines.per_sample.rows import FactoredJacobian
from mogb.jacobian import Jacobian

Situation = frozenset[tuple[str, int]]  # which layers were called, with batches of which size


@dataclass(frozen=True, eq=False)
class PerSampleReport:
    """What the last call did.

    Attributes:
        objectives: K.
        samples: B.
        terms: J.
        passes: Backward passes spent, that of the self-check included.
        rank: Passes that the terms needed: J, or fewer where their cotangents are dependent. None where K ordinary
            passes were used, because samples can't be told apart (see ``reason``) or because these are not more.
        store: ``"dense"`` for K rows, ``"factored"`` for ``rank * B`` rows and K combinations of them, ``"gramian"``
            where no rows were kept.
        reason: Why samples can't be told apart; empty if they can.
        check_error: The relative deviation that the self-check found; None where it did not run.
    """

    objectives: int
    samples: int
    terms: int
    passes: int
    rank: int | None
    store: str
    reason: str = ""
    check_error: float | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One call: what was asked for, with one more objective if it is checked, and how it is answered.

    Attributes:
        passes: None for one ordinary backward pass per objective.
        reason: Why, unless that takes no more passes anyway.
    """

    problem: Problem
    asked: Problem
    passes: Passes | None
    situation: Situation
    check: bool
    reason: str = ""


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a word that is none of the choices."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {given!r}.")


def as_matrix(basis: object) -> np.ndarray | None:
    """An explicit basis as an array."""
    return basis.detach().to("cpu", torch.float64).numpy() if isinstance(basis, Tensor) else None


def check_rows(rows: Jacobian, store: str, count: int, params: Sequence[Tensor]) -> None:
    """Raises ValueError if new rows can't be added to these."""
    if store == "factored" or isinstance(rows, FactoredJacobian):
        raise ValueError(
            "Rows of several micro-batches add up only in the dense form: ask for store='dense' from the first one on."
        )
    if [tuple(block.shape) for block in rows.blocks] != [(count, *param.shape) for param in params]:
        raise ValueError(
            f"add_to holds {len(rows)} rows of {len(rows.blocks)} parameters, which does not fit {count} objectives "
            f"and {len(params)} parameters: pass what gradients() returned for an earlier micro-batch."
        )


def without_probe(jacobian: Jacobian) -> Jacobian:
    """All rows but the last."""
    if isinstance(jacobian, FactoredJacobian):
        return FactoredJacobian(jacobian.basis, jacobian.coefficients[:-1])
    return Jacobian(tuple(block[:-1] for block in jacobian.blocks))


def added(jacobian: Jacobian, rows: Jacobian | None) -> Jacobian:
    """Adds to the rows of earlier micro-batches in place, if there are any."""
    if rows is None:
        return jacobian
    for block, more in zip(rows.blocks, jacobian.blocks, strict=True):
        block.add_(more)
    return rows
