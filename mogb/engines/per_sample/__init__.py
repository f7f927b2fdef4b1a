r"""K gradients without K backward passes, for losses that are linear in terms of single samples.

.. math::  L_k = \sum_{ij} W_{kij} \, t_{ij}(\theta)

with constant coefficients W. Many losses are of this form:

===============================  =======================================  =========================================
losses                           terms of sample i                        coefficients
===============================  =======================================  =========================================
means over groups (group DRO)    its loss                                 1 / size of the group, for its members
PPO, GRPO with K rewards         ``min(r, 1 + e)`` and ``max(r, 1 - e)``  ``-max(A, 0) / B`` and ``-min(A, 0) / B``
REINFORCE with K rewards         its log-probability                      ``-A / B``
tasks with samples of their own  the task's loss                          1 / number of the task's samples
===============================  =======================================  =========================================

J terms cost J backward passes, or fewer where they send parallel cotangents into the network: clipping costs one
pass at the first inner step, where every ratio r is 1.

Examples:
    The losses of two groups, balanced in one backward pass (and one more of the first call's self-check):

    >>> import torch, mogb
    >>> from mogb.engines.per_sample import PerSample
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> engine = PerSample(model).attach()
    >>> members = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    >>> losses = model(torch.randn(5, 4))[:, 0].square()
    >>> report = engine.backward(losses, members / members.sum(1, keepdim=True), mogb.make("mgda"))
    >>> report.backward_passes
    2

    Clipped policy gradients with three rewards; both terms are parallel at the first inner step:

    >>> advantages = torch.randn(3, 5)
    >>> log_probability = -model(torch.randn(5, 4))[:, 0].square()
    >>> ratio = (log_probability - log_probability.detach()).exp()
    >>> terms = torch.stack([ratio.clamp(max=1.2), ratio.clamp(min=0.8)], 1)
    >>> coefficients = torch.stack([-advantages.clamp(min=0), -advantages.clamp(max=0)], 2) / 5
    >>> jacobian = engine.gradients(terms, coefficients)
    >>> len(jacobian), engine.report.rank
    (3, 1)

    Micro-batches add up in dense rows:

    >>> rows = None
    >>> for part in torch.randn(10, 4).split(5):
    ...     rows = engine.gradients(model(part)[:, 0].square(), torch.rand(3, 5) / 10, add_to=rows, store="dense")
"""

from mogb.engines.per_sample.engine import PerSample
from mogb.engines.per_sample.errors import PerSampleError, UnsupportedLayerError
from mogb.engines.per_sample.rows import FactoredJacobian
from mogb.engines.per_sample.step import PerSampleReport

__all__ = ["FactoredJacobian", "PerSample", "PerSampleError", "PerSampleReport", "UnsupportedLayerError"]
