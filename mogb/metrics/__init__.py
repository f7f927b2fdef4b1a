"""Numbers about a step, an end point or a front. NumPy arrays or tensors in, plain floats and arrays out."""

from mogb.metrics.conflict import (
    Harmony,
    condition_number,
    conflict_share,
    cosines,
    curvature,
    harmony,
    magnitude_similarity,
)
from mogb.metrics.front import (
    distance_to_polyline,
    distance_to_samples,
    epsilon_plus,
    igd,
    igd_plus,
    non_dominated,
    spacing,
)
from mogb.metrics.hypervolume import Estimate, estimate_hypervolume, hypervolume
from mogb.metrics.invariance import Shift, end_point_shift
from mogb.metrics.stationarity import Stationarity, stationarity
from mogb.metrics.steps import steps_to_tolerance

__all__ = [
    "Estimate",
    "Harmony",
    "Shift",
    "Stationarity",
    "condition_number",
    "conflict_share",
    "cosines",
    "curvature",
    "distance_to_polyline",
    "distance_to_samples",
    "end_point_shift",
    "epsilon_plus",
    "estimate_hypervolume",
    "harmony",
    "hypervolume",
    "igd",
    "igd_plus",
    "magnitude_similarity",
    "non_dominated",
    "spacing",
    "stationarity",
    "steps_to_tolerance",
]
