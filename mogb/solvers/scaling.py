r"""The unit-diagonal form of a Gramian, in which every solver of this package works.

With :math:`S = \mathrm{diag}(\|g_1\|, \dots, \|g_K\|)` the Gramian is :math:`G = S C S`, where C holds the cosines
between the gradients. A solver that sees C alone, and the norms only as ratios, is blind to the scale of the losses,
and differences between the gradients' norms cost it no digits.

Shapes: K = objectives, R = rank of the Gramian.
"""

import numpy as np
from jaxtyping import Float64
from scipy.linalg.lapack import dpotrf

EPS = float(np.finfo(np.float64).eps)


def unit_diagonal(
    gramian: Float64[np.ndarray, "K K"],
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, "K K"]]:
    """The row norms and the cosines. A zero row has the norm 0 and zero cosines, also with itself.

    Only the symmetric part counts, and a diagonal entry that rounding made negative counts as zero.
    """
    squares = gramian.diagonal()
    if squares.min() > 0:
        norms = np.sqrt(squares)
        inverse = 1 / norms
    else:
        norms = np.sqrt(np.maximum(squares, 0.0))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = gramian * inverse * inverse[:, None]
    cosines = (cosines + cosines.T) * 0.5
    cosines.flat[:: len(norms) + 1] = norms > 0
    return norms, cosines


def factor(cosines: Float64[np.ndarray, "K K"]) -> tuple[Float64[np.ndarray, "R K"], float]:
    """A matrix F with F^T F = C, and the largest entry of F^T F - C.

    Its columns are the unit gradients in coordinates of their own span. By Cholesky where C is positive definite, and
    by its eigenvectors otherwise; then eigenvalues that are zero up to rounding, negative ones included, are left out.
    """
    triangle, info = dpotrf(cosines, clean=1)
    if info == 0:
        return triangle, 0.0
    values, vectors = np.linalg.eigh(cosines)
    kept = values > len(values) * EPS * values[-1]
    rows = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return rows, float(np.abs(rows.T @ rows - cosines).max())
