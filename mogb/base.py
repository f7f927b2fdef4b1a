"""What a balancing method is. Read this file first.

A method's type says what it *reads*, and so what an engine has to compute for it:

===========================  ====================  ===================================
base class                   reads                 the method writes
===========================  ====================  ===================================
:class:`LossAggregator`      the K losses          ``_weights(losses)``
:class:`GramianAggregator`   ``G = J J^T``         ``_weights(gramian)``
:class:`GramianLossAggregator`  both               ``_weights(gramian, losses)``
:class:`JacobianAggregator`  all of ``J``          ``_direction(jacobian)``
===========================  ====================  ===================================

Two worlds meet here and nowhere else. K-sized things (losses, Gramian, weights) are float64 NumPy arrays on the CPU,
where small problems are solved exactly; N-sized things (gradients, directions) are torch tensors in their own dtype on
their own device. The public methods check their input once, in the user's words, and convert; what a method writes
(the underscored methods) may trust its input.

Some methods need more of a training loop than losses and gradients; :attr:`Aggregator.phases` says what. A loop that
serves every method::

    optimizer = torch.optim.Adam([*model.parameters(), *method.parameters()])
    for epoch in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            mogb.backward(losses_of(batch), model, method)
            optimizer.step()
            if "update" in method.phases:  # costs a forward pass
                with torch.no_grad():
                    method.update(losses_of(batch))
        method.end_epoch()

Calling what a method does not have does nothing. Forgetting what it needs is a RuntimeError that says what to call.

State is replaced, never changed in place, and only once nothing can fail any more: a step that fails leaves a method
as it was.

Shapes: K = objectives, N = numbers in one gradient.
"""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from mogb.errors import NonFiniteError
from mogb.jacobian import Jacobian, all_finite
from mogb.learned import LearnedVector
from mogb.options import settle_types

Reads = Literal["losses", "gramian", "gramian+losses", "jacobian"]
Phase = Literal["parameters", "update", "end_epoch"]
StateKind = Literal["array", "tensor", "tensors", "number", "generator", "learned"]
StateValue = Tensor | float | int | bool | str

_REGISTRY: dict[str, type["Aggregator"]] = {}


class Promise(Enum):
    """What theory guarantees of a method *and* this implementation keeps. The contract tests check every one.

    Each holds for every input, up to rounding, from the state of a fresh instance. Rescaling an objective rescales its
    loss and its gradient. The weights of a direction that several weights give may differ where it does not.
    """

    NON_CONFLICTING = "non-conflicting"  # d . g_k >= 0 for every objective k
    SIMPLEX_WEIGHTS = "simplex weights"  # weights >= 0 that sum to 1; all 0 where there is no direction
    PERMUTATION_EQUIVARIANT = "permutation equivariant"  # reordering the objectives leaves d where it was
    SCALE_FREE = "scale-free"  # rescaling one objective leaves d / |d| where it was
    HOMOGENEOUS = "homogeneous"  # d(s J) = s d(J) for s > 0


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a method was published.

    Attributes:
        authors: As in a bibliography, "A. Author, B. Author and C. Author".
        title: Of the paper.
        venue: Conference or journal; None for a preprint.
        year: Of publication.
        arxiv: Identifier such as ``"1810.04650"``, if there is one.
        url: Another address, if there is no arXiv identifier.
        code: The official code, ``owner/repository``, if there is any.
    """

    authors: str
    title: str
    year: int
    venue: str | None = None
    arxiv: str | None = None
    url: str | None = None
    code: str | None = None

    def bibtex(self, key: str) -> str:
        """The reference as one BibTeX entry."""
        authors = self.authors.replace(", ", " and ")
        lines = [f"author = {{{authors}}}", f"title = {{{{{self.title}}}}}", f"year = {{{self.year}}}"]
        if self.venue is not None:
            lines.append(f"booktitle = {{{self.venue}}}")
        if self.arxiv is not None:
            lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        if self.url is not None:
            lines.append(f"url = {{{self.url}}}")
        kind = "misc" if self.venue is None else "inproceedings"
        return f"@{kind}{{{key},\n  " + ",\n  ".join(lines) + "\n}"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a weight-yielding method answers.

    Attributes:
        weights: On the raw gradients, ``[K]``.
        residual: How far the small problem's optimality conditions are from holding, relative; 0 for closed forms.
        converged: False when a solver gave up; the weights are then its best point.
        left_out: Objectives that took no part, such as zero gradients.
        note: What a reader of the report should know, such as "Pareto stationary"; empty for an ordinary answer.
        details: Named numbers of the method (the simplex weights behind rescaled ones, say), for the curious.
        value: Of the function of the losses whose derivatives the weights are, where there is one.
    """

    weights: Float64[np.ndarray, " K"]
    residual: float = 0.0
    converged: bool = True
    left_out: tuple[int, ...] = ()
    note: str = ""
    details: Mapping[str, Float64[np.ndarray, "..."]] = field(default_factory=dict)
    value: float | None = None

    def among(self, live: Bool[np.ndarray, " L"]) -> "Solution":
        """The same answer among L objectives: those that took no part have the weight 0 and are left out."""
        positions = live.nonzero()[0]
        left_out = (~live).nonzero()[0].tolist() + [int(positions[index]) for index in self.left_out]
        return replace(
            self,
            weights=_spread(self.weights, live),
            left_out=tuple(sorted(left_out)),
            details={name: _spread(value, live) for name, value in self.details.items()},
        )


def state(default: Any = None, *, kind: StateKind = "array") -> Any:
    """Declares a dataclass field that is state: not an option, reset by ``reset()``, saved by ``state_dict()``.

    ``kind`` says what the field holds when it is not None: a float64 NumPy array, a torch tensor, a tuple of tensors
    (saved under ``name.0``, ``name.1`` ...), a plain number, a ``torch.Generator`` or a
    :class:`~mogb.learned.LearnedVector`. The last two are made in ``_start()``.
    """
    return field(default=default, init=False, repr=False, compare=False, metadata={"state": kind})


class Aggregator(ABC):
    """Combines K gradients into one direction, which the optimizer subtracts.

    Attributes:
        name: As in the registry.
        reads: What the engine has to compute.
        reference: Where it was published.
        promises: What it guarantees with its default options; see :attr:`keeps`.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[Reference]
    promises: ClassVar[frozenset[Promise]] = frozenset()

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Registers the class under ``name``, if one is given."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            _REGISTRY[name] = cls

    def __post_init__(self) -> None:
        settle_types(self)
        self._check()
        self._start()

    @property
    @abstractmethod
    def reads(self) -> Reads: ...

    @property
    def keeps(self) -> frozenset[Promise]:
        """What this instance guarantees: the promises, less those that its options give up."""
        return self.promises

    @property
    def yields_weights(self) -> bool:
        """Whether the direction is a weighted sum of the gradients whose weights are known."""
        return self.reads != "jacobian"

    @property
    def needs_positive_losses(self) -> bool:
        """Whether it takes logarithms or ratios of the losses, and refuses those that are not positive."""
        return False

    @property
    def scales_coordinates(self) -> bool:
        """Whether it scales every coordinate apart, as Adam does, so that not even one gradient keeps its direction."""
        return False

    @property
    def phases(self) -> frozenset[Phase]:
        """What this instance needs of a training loop besides its input at every step; see the top of this module.

        ``"parameters"``: an optimizer must get :meth:`parameters`. ``"update"``: :meth:`update` must be called after
        every optimizer step. ``"end_epoch"``: :meth:`end_epoch` must be called after every epoch.
        """
        return frozenset()

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the user's optimizer has to learn, empty for most methods; every solve sets their ``.grad``.

        They are float64 numbers on the CPU, one per objective. Keep weight decay and gradient scalers away from them:
        give them a parameter group or an optimizer of their own.
        """
        learned = (getattr(self, item.name) for item in _state_fields(self) if item.metadata["state"] == "learned")
        return tuple(vector.hand_out() for vector in learned)

    def update(self, losses: Float[Tensor, " K"] | Sequence[Tensor | float] | Mapping[str, Tensor]) -> None:
        """Shows a two-phase method what the optimizer step did.

        Nothing happens if the last step did not solve, as when its weights were reused. Where several processes train
        together, all must pass the same numbers: the mean over the processes.

        Args:
            losses: Of the batch of the last solve, evaluated again after the step.

        Raises:
            TypeError: No floating-point numbers.
            ValueError: A wrong shape.
            NonFiniteError: NaN or Inf in a loss. Nothing is learned from this step, and the next one may follow.
        """
        if "update" not in self.phases:
            return
        try:
            values = _loss_array(self, _as_vector(losses), None)
        except NonFiniteError:
            self._update(None)
            raise
        assert values is not None
        self._update(values)

    def end_epoch(self) -> None:
        """Tells a method that compares epochs that one is over."""
        if "end_epoch" in self.phases:
            self._end_epoch()

    def solve(self, gramian: Float[Tensor, "K K"] | None = None, losses: Float[Tensor, " K"] | None = None) -> Solution:
        """The weights with their certificate.

        Args:
            gramian: Inner products of the K gradients. Methods that read only losses do not look at it.
            losses: The K loss values, for the methods that read them.

        Raises:
            TypeError: This method yields no weights, or an input is missing or no floating-point tensor.
            ValueError: A wrong shape.
            NonFiniteError: NaN or Inf in an input.
        """
        if not self.yields_weights:
            raise TypeError(f"{self.name!r} reads the whole Jacobian and yields no weights: call it on a Jacobian.")
        return self._checked(*_as_arrays(self, gramian, losses))

    def weights(
        self, gramian: Float[Tensor, "K K"] | None = None, losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, " K"]:
        """The weights on the raw gradients, in the dtype and on the device of the input. See :meth:`solve`."""
        solution = self.solve(gramian, losses)
        like = torch.as_tensor(gramian if gramian is not None else losses)
        return torch.from_numpy(solution.weights).to(like.device, like.dtype)

    def __call__(
        self, jacobian: Float[Tensor, "K N"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, " N"]:
        """The combined direction.

        Raises:
            TypeError: The Jacobian is no floating-point tensor, or losses are missing.
            ValueError: A wrong shape.
            NonFiniteError: NaN or Inf in a gradient or a loss; it names the objective.
        """
        _check_jacobian(jacobian)
        direction, _, _ = self.direct(Jacobian((jacobian.detach(),)), _loss_array(self, losses, len(jacobian)))
        return direction[0]

    def direct(
        self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None
    ) -> tuple[tuple[Tensor, ...], Float64[np.ndarray, "K K"] | None, Solution | None]:
        """For engines: the direction block by block, the Gramian and the solution where they were formed."""
        gramian = None
        if self.reads != "losses":
            gramian = self._gramian(jacobian)
        with self.undone_on_failure():
            solution = self._checked(gramian, losses if losses is not None else np.ones(len(jacobian)))
            direction = jacobian.combine(solution.weights)
            if not jacobian.is_finite(direction):
                raise NonFiniteError("direction" if (i := jacobian.first_non_finite()) is None else "gradient", i)
        return direction, gramian, solution

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """For engines: whatever fails inside leaves the state as it was before."""
        saved = self._remember()
        try:
            yield
        except BaseException:
            self._recall(saved)
            raise

    def reset(self) -> None:
        """Forgets every past step: the state is that of a fresh instance, generators included."""
        for item in _state_fields(self):
            if item.metadata["state"] == "learned":
                getattr(self, item.name).restart()
            else:
                object.__setattr__(self, item.name, item.default)
        self._start()

    def state_dict(self) -> dict[str, StateValue]:
        """The state as tensors and plain numbers; empty for a stateless method."""
        saved: dict[str, StateValue] = {}
        for item in _state_fields(self):
            key, value = item.name.lstrip("_"), getattr(self, item.name)
            if item.metadata["state"] == "tensors":
                saved |= {f"{key}.{index}": _pack(part) for index, part in enumerate(value or ())}
            elif value is not None:
                saved[key] = _pack(value)
        return saved

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Takes over a state that :meth:`state_dict` gave, also into a fresh instance. What fails changes nothing.

        Raises:
            ValueError: A key that this method does not know, a part of a list that is missing, or a damaged value.
        """
        before = self.state_dict()
        try:
            self._load(state)
        except Exception as error:
            self._load(before)
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"This state of {self.name!r} is damaged ({type(error).__name__}: {error}): load another copy of it."
            ) from error

    def _load(self, state: Mapping[str, StateValue]) -> None:
        known = {item.name.lstrip("_"): item for item in _state_fields(self)}
        given, unknown = _by_field(state, known)
        if unknown:
            raise ValueError(
                f"{self.name!r} has no state named {', '.join(unknown)}. Its state: {', '.join(known) or 'none'}. "
                "Load a state that was saved by the same method."
            )
        self.reset()
        for key, value in given.items():
            item = known[key]
            object.__setattr__(self, item.name, _unpack(item.metadata["state"], value, getattr(self, item.name)))

    def _check(self) -> None:
        """Checks the options once, when the method is made; raises ValueError or TypeError."""

    def _start(self) -> None:
        """Makes generators and learned vectors, after construction; on reset, generators again."""

    def _update(self, losses: Float64[np.ndarray, " K"] | None) -> None:
        """The second half of a step of a two-phase method; None if the losses after the step were not finite."""

    def _end_epoch(self) -> None:
        """Closes an epoch, for a method that compares epochs."""

    def _remember(self) -> dict[str, Any]:
        """The state as it is now, by reference."""
        return {name: _snapshot(getattr(self, name)) for name in _restorable(type(self))}

    def _recall(self, saved: Mapping[str, Any]) -> None:
        """Goes back to a state that :meth:`_remember` gave."""
        for name in _restorable(type(self)):
            if isinstance(current := getattr(self, name), torch.Generator):
                current.set_state(saved[name])
            else:
                object.__setattr__(self, name, saved[name])

    def _gramian(self, jacobian: Jacobian) -> Float64[np.ndarray, "K K"]:
        gramian = jacobian.gramian()
        if not math.isfinite(gramian.trace()):  # NaN and Inf in a row reach its squared norm
            if jacobian.across is None and jacobian.first_non_finite() is None:
                raise NonFiniteError("direction", None)  # the squares of finite numbers overflowed
            raise NonFiniteError("gradient", int(np.argmin(np.isfinite(gramian.diagonal()))))
        return gramian

    def _checked(
        self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None
    ) -> Solution:
        solution = self._solve(gramian, losses)
        if not math.isfinite(float(solution.weights.sum())):
            raise NonFiniteError("direction", None)
        return solution

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        """The weights for checked arrays."""
        raise TypeError(f"{self.name!r} yields no weights.")

    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution:
        """The weights for some of the objectives, as if there were no others; these get 0 and are left out.

        This is what a wrapper calls on the method that it wears. It never makes a state change its size.
        """
        if live.all():
            return self._solve(gramian, losses)
        if not live.any():
            return Solution(np.zeros(len(live)), left_out=tuple(range(len(live))), note="all gradients are zero")
        some_gramian = None if gramian is None else gramian[live][:, live]
        some_losses = None if losses is None else losses[live]
        return self._only(live)._solve(some_gramian, some_losses).among(live)

    def _only(self, live: Bool[np.ndarray, " K"]) -> "Aggregator":
        """The same method for some of the objectives. A method with one option per objective picks from it here."""
        return self


class LossAggregator(Aggregator):
    """A method that needs only the losses: one backward pass, of ``weights @ losses``.

    Where it is defined by a function f of the losses, the weights are the derivatives of f: ``weights @ losses`` then
    has the gradient of f, but in general not its value, which is the solution's ``value``.
    """

    needs_values: ClassVar[bool] = True  # False: only their number counts, so that a Jacobian alone will do

    @property
    def reads(self) -> Reads:
        return "losses"

    @abstractmethod
    def _weights(self, losses: Float64[np.ndarray, " K"]) -> Solution: ...

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        assert losses is not None
        return self._weights(losses)


class GramianAggregator(Aggregator):
    """A method whose weights depend on the inner products of the gradients alone."""

    @property
    def reads(self) -> Reads:
        return "gramian"

    @property
    def leaves_out_zero(self) -> bool:
        """Whether zero gradients take no part. Otherwise they count: nothing can improve such an objective."""
        return False

    @abstractmethod
    def _weights(self, gramian: Float64[np.ndarray, "K K"]) -> Solution: ...

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        assert gramian is not None
        if self.leaves_out_zero and (zero := _zero_rows(gramian)) is not None:
            return self._solve_live(gramian, losses, ~zero)
        return self._weights(gramian)


class GramianLossAggregator(Aggregator):
    """A method whose weights depend on the inner products of the gradients and on the loss values."""

    @property
    def reads(self) -> Reads:
        return "gramian+losses"

    @property
    def leaves_out_zero(self) -> bool:
        """Whether zero gradients take no part. Otherwise they count: nothing can improve such an objective."""
        return False

    @abstractmethod
    def _weights(self, gramian: Float64[np.ndarray, "K K"], losses: Float64[np.ndarray, " K"]) -> Solution: ...

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        assert gramian is not None
        assert losses is not None
        if self.leaves_out_zero and (zero := _zero_rows(gramian)) is not None:
            return self._solve_live(gramian, losses, ~zero)
        return self._weights(gramian, losses)


class JacobianAggregator(Aggregator):
    """A method that looks at single coordinates of the gradients: K backward passes, all rows kept.

    It answers with a direction or, where that is a weighted sum of the gradients, with the weights.
    """

    @property
    def needs_losses(self) -> bool:
        """Whether it reads the losses too."""
        return False

    @property
    def reads(self) -> Reads:
        return "jacobian"

    @abstractmethod
    def _direction(
        self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None
    ) -> tuple[Tensor, ...] | Solution: ...

    def direct(
        self, jacobian: Jacobian, losses: Float64[np.ndarray, " K"] | None
    ) -> tuple[tuple[Tensor, ...], Float64[np.ndarray, "K K"] | None, Solution | None]:
        """For engines: the direction block by block, and the solution if there are weights."""
        if self.yields_weights:  # with options that make the Gramian enough
            return super().direct(jacobian, losses)
        with self.undone_on_failure():
            found = self._direction(jacobian, losses)
            solution = found if isinstance(found, Solution) else None
            direction = jacobian.combine(found.weights) if isinstance(found, Solution) else found
            if not all_finite(direction):
                raise NonFiniteError("direction" if (i := jacobian.first_non_finite()) is None else "gradient", i)
        return direction, None, solution


class Wrapper(Aggregator):
    """An aggregator that changes what another one sees or returns. It reads what the other one reads.

    Attributes:
        inner: The method that it wears.
        needs_gramian: Whether it reads the Gramian even where the method inside does not.
        needs_values: Whether it reads the values of the losses even where the method inside does not.
    """

    inner: Aggregator
    needs_gramian: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    @property
    def reads(self) -> Reads:
        gramian = self.needs_gramian or self.inner.reads != "losses"
        if self.needs_values or needs_losses(self.inner):
            return "gramian+losses" if gramian else "losses"
        return "gramian" if gramian else "losses"

    def _solve(self, gramian: Float64[np.ndarray, "K K"] | None, losses: Float64[np.ndarray, " K"] | None) -> Solution:
        size = len(gramian) if gramian is not None else len(losses) if losses is not None else 0
        return self._solve_live(gramian, losses, np.ones(size, dtype=bool))

    @abstractmethod
    def _solve_live(
        self,
        gramian: Float64[np.ndarray, "K K"] | None,
        losses: Float64[np.ndarray, " K"] | None,
        live: Bool[np.ndarray, " K"],
    ) -> Solution: ...

    @property
    def reference(self) -> Reference:  # type: ignore[override]
        """The reference of the method inside."""
        return self.inner.reference

    @property
    def needs_positive_losses(self) -> bool:
        return self.inner.needs_positive_losses

    @property
    def phases(self) -> frozenset[Phase]:
        return self.inner.phases

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of the method inside."""
        return self.inner.parameters()

    def _update(self, losses: Float64[np.ndarray, " K"] | None) -> None:
        self.inner._update(losses)

    def _end_epoch(self) -> None:
        self.inner._end_epoch()

    def _remember(self) -> dict[str, Any]:
        return super()._remember() | {"inner": self.inner._remember()}

    def _recall(self, saved: Mapping[str, Any]) -> None:
        super()._recall(saved)
        self.inner._recall(saved["inner"])

    def reset(self) -> None:
        """Forgets every past step, also of the method inside."""
        super().reset()
        self.inner.reset()

    def state_dict(self) -> dict[str, StateValue]:
        """The state of the wrapper, and that of the method inside under ``inner.``."""
        inner = {f"inner.{key}": value for key, value in self.inner.state_dict().items()}
        return super().state_dict() | inner

    def _load(self, state: Mapping[str, StateValue]) -> None:
        prefix = "inner."
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        super()._load({key: value for key, value in state.items() if not key.startswith(prefix)})
        self.inner._load(inner)

    def _check(self) -> None:
        if not isinstance(self.inner, Aggregator):
            raise TypeError(f"inner must be an aggregator, such as mogb.make('mgda'), but got {self.inner!r}.")
        if not self.inner.yields_weights:
            raise ValueError(
                f"A wrapper needs a method that yields weights, but inner={self.inner.name!r} reads the whole Jacobian."
            )


def option_names(cls: type[Aggregator]) -> tuple[str, ...]:
    """The options of a method, in the order of its class."""
    return tuple(name for name in inspect.signature(cls.__init__).parameters if name != "self")


def _spread(values: Float64[np.ndarray, "*S"], live: Bool[np.ndarray, " K"]) -> Float64[np.ndarray, "*K"]:
    """Values of the live objectives among those of all of them, which are 0. Other shapes stay as they are."""
    if values.shape != (np.count_nonzero(live),):
        return values
    spread = np.zeros(len(live))
    spread[live] = values
    return spread


def _zero_rows(gramian: Float64[np.ndarray, "K K"]) -> Bool[np.ndarray, " K"] | None:
    """Which gradients are zero; None if there is none."""
    squares = gramian.diagonal()
    return squares <= 0 if squares.min() <= 0 else None


def _state_fields(aggregator: Aggregator) -> list["dataclasses.Field[Any]"]:
    return [item for item in dataclasses.fields(aggregator) if "state" in item.metadata]  # type: ignore[arg-type]


@cache
def _restorable(cls: type[Aggregator]) -> tuple[str, ...]:
    """The state fields that a failed step may have changed. Learned numbers change only with an optimizer's step."""
    return tuple(
        item.name
        for item in dataclasses.fields(cls)  # type: ignore[arg-type]
        if item.metadata.get("state", "learned") != "learned"
    )


def _snapshot(value: Any) -> Any:
    return value.get_state() if isinstance(value, torch.Generator) else value


def _by_field(
    state: Mapping[str, StateValue], known: Mapping[str, "dataclasses.Field[Any]"]
) -> tuple[dict[str, Any], list[str]]:
    """The saved values by field, lists of tensors put together, and the keys that belong to none."""
    given: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in state.items():
        stem, dot, index = key.partition(".")
        if stem not in known or (known[stem].metadata["state"] == "tensors") != (index.isdigit() and bool(dot)):
            unknown.append(key)
        elif dot:
            given.setdefault(stem, {})[int(index)] = value
        else:
            given[key] = value
    for stem, parts in given.items():
        if known[stem].metadata["state"] == "tensors":
            if sorted(parts) != list(range(len(parts))):
                raise ValueError(
                    f"The state {stem!r} lacks parts: it has {', '.join(map(str, sorted(parts)))}. Load all of it."
                )
            given[stem] = [parts[index] for index in range(len(parts))]
    return given, sorted(unknown)


def _pack(value: Any) -> StateValue:
    if isinstance(value, LearnedVector):
        return value.save()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value


def _unpack(kind: str, value: Any, current: Any) -> Any:
    if kind == "generator":
        current.set_state(value)
        return current
    if kind == "learned":
        current.load(value)
        return current
    if kind == "tensors":
        return tuple(torch.as_tensor(part).detach().clone() for part in value)
    if kind == "array":
        return torch.as_tensor(value).detach().cpu().double().numpy().copy()
    if kind == "tensor":
        return torch.as_tensor(value).detach().clone()
    return value


def _check_jacobian(jacobian: Tensor) -> None:
    if not isinstance(jacobian, Tensor) or not jacobian.is_floating_point():
        found = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"jacobian must be a floating-point tensor [K, N], one gradient a row, but got {found}.")
    if jacobian.ndim != 2 or 0 in jacobian.shape:
        raise ValueError(
            f"jacobian must have the shape [K, N] with K, N >= 1, one gradient a row, but got {list(jacobian.shape)}."
        )


def _as_arrays(
    aggregator: Aggregator, gramian: Tensor | None, losses: Tensor | None
) -> tuple[Float64[np.ndarray, "K K"] | None, Float64[np.ndarray, " K"] | None]:
    matrix = None
    if gramian is not None:
        if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
            found = gramian.dtype if isinstance(gramian, Tensor) else type(gramian).__name__
            raise TypeError(f"gramian must be a floating-point tensor [K, K], but got {found}.")
        if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
            raise ValueError(f"gramian must have the shape [K, K] with K >= 1, but got {list(gramian.shape)}.")
        matrix = gramian.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(matrix).all():  # NaN and Inf in a row reach its squared norm first
            finite = np.isfinite(matrix)
            by_row = finite.diagonal() if not finite.diagonal().all() else finite.all(axis=1)
            raise NonFiniteError("gradient", int(np.argmin(by_row)))
    elif aggregator.reads != "losses":
        raise TypeError(f"{aggregator.name!r} reads the Gramian: pass gramian=[K, K].")
    return matrix, _loss_array(aggregator, losses, None if matrix is None else len(matrix))


def _as_vector(losses: Tensor | Sequence[Tensor | float] | Mapping[str, Tensor]) -> Tensor:
    """The losses of a training loop as one tensor, whatever they came in."""
    if isinstance(losses, Tensor):
        return losses
    items = tuple(losses.values()) if isinstance(losses, Mapping) else tuple(losses)
    scalars = [item.detach() if isinstance(item, Tensor) else torch.tensor(float(item)) for item in items]
    if not scalars or any(scalar.numel() != 1 for scalar in scalars):
        raise ValueError("losses must be one number per objective: a tensor [K], or K scalars.")
    return torch.stack([scalar.reshape(()).to("cpu", torch.float64) for scalar in scalars])


def _loss_array(
    aggregator: Aggregator, losses: Tensor | Sequence[float] | None, size: int | None
) -> Float64[np.ndarray, " K"] | None:
    reads_losses = needs_losses(aggregator)
    if losses is None:
        if reads_losses:
            raise TypeError(f"{aggregator.name!r} reads the loss values: pass losses=[K].")
        if size is None:
            raise TypeError(
                f"{aggregator.name!r} needs losses=[K], or a Gramian, to know how many objectives there are."
            )
        return np.ones(size)
    values = torch.as_tensor(losses).detach()
    if not values.is_floating_point() and not values.is_complex():
        raise TypeError(f"losses must be floating-point numbers [K], but got {values.dtype}.")
    if values.is_complex() or values.ndim != 1 or len(values) == 0:
        raise ValueError(f"losses must be real numbers of the shape [K], but got {list(values.shape)}, {values.dtype}.")
    if size is not None and len(values) != size:
        raise ValueError(f"losses must have one value per objective, {size}, but got {len(values)}.")
    array = values.to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        raise NonFiniteError("loss", int(np.argmin(np.isfinite(array))))
    return array


def needs_losses(aggregator: Aggregator) -> bool:
    """Whether the values of the losses matter, beyond their number."""
    reads = aggregator.reads
    if reads != "losses":
        return reads == "gramian+losses" or (isinstance(aggregator, JacobianAggregator) and aggregator.needs_losses)
    while isinstance(aggregator, Wrapper):
        if aggregator.needs_values:
            return True
        aggregator = aggregator.inner
    return isinstance(aggregator, LossAggregator) and aggregator.needs_values
