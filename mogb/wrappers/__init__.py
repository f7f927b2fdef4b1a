"""Methods that change what another one sees or returns. Any method that yields weights can wear them.

Write ``from mogb.wrappers.smoothed import Smoothed`` for a class; :data:`WRAPPERS` finds it by its name.
"""

from mogb.base import Wrapper
from mogb.wrappers.logarithmic import Logarithmic
from mogb.wrappers.normalized import Normalized
from mogb.wrappers.refreshed import Refreshed
from mogb.wrappers.rescaled import Rescaled
from mogb.wrappers.silenced import Silenced
from mogb.wrappers.smoothed import Smoothed

WRAPPERS: dict[str, type[Wrapper]] = {
    "logarithmic": Logarithmic,
    "normalized": Normalized,
    "refreshed": Refreshed,
    "rescaled": Rescaled,
    "silenced": Silenced,
    "smoothed": Smoothed,
}
