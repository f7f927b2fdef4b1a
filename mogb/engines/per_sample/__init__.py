"""K gradients without K backward passes, for losses that are linear in terms of single samples."""

from mogb.engines.per_sample.engine import PerSample, PerSampleReport
from mogb.engines.per_sample.errors import PerSampleError, UnsupportedLayerError
from mogb.engines.per_sample.rows import FactoredJacobian

__all__ = ["FactoredJacobian", "PerSample", "PerSampleError", "PerSampleReport", "UnsupportedLayerError"]
