r"""The unit-diagonal form of a Gramian, in which every solver here works.

With :math:`S = \mathrm{diag}(\|g_1\|, \dots, \|g_K\|)`, the Gramian is :math:`G = S C S`, and :math:`C` holds the
cosines between the gradients. Solving on C makes the differences between the gradients' norms harmless.

Shapes: K = objectives.
"""

import numpy as np
from jaxtyping import Float64


def unit_diagonal(
    gramian: Float64[np.ndarray, "K K"],
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, "K K"]]:
    """The row norms and the cosines. A zero row has the norm 0 and zero cosines, also with itself."""
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = inverse[:, None] * gramian * inverse
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, norms > 0)
    return norms, cosines


def factor(cosines: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
    """A matrix F with F^T F = C; negative eigenvalues, which only rounding can cause, count as zero."""
    values, vectors = np.linalg.eigh(cosines)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
