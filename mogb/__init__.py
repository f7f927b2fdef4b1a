"""mogb: multi-objective gradient balancing for PyTorch.

K losses in, one direction in ``param.grad`` out. Start with :func:`backward` and :func:`make`.
"""

from importlib.metadata import PackageNotFoundError, version

from mogb.aggregators import make, registered
from mogb.base import Aggregator, Promise, Reference, Solution
from mogb.engines.backward import Report, backward
from mogb.engines.balancer import Balancer
from mogb.engines.per_sample import PerSample
from mogb.errors import DistributedError, NonFiniteError
from mogb.monitor import Monitor
from mogb.solvers import MinNormResult, min_norm

try:
    __version__ = version("mogb")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Aggregator",
    "Balancer",
    "DistributedError",
    "MinNormResult",
    "Monitor",
    "NonFiniteError",
    "PerSample",
    "Promise",
    "Reference",
    "Report",
    "Solution",
    "__version__",
    "backward",
    "make",
    "min_norm",
    "registered",
]
