"""The exceptions that mogb raises on purpose, beside ValueError and TypeError."""


class NonFiniteError(ValueError):
    """A loss, a gradient or a direction holds NaN or Inf.

    Attributes:
        index: The position of the offending objective. None when only the combination overflowed, or when a single
            backward pass of the combined losses freed the graph before the culprit could be told.
        what: ``"loss"``, ``"gradient"`` or ``"direction"``.
    """

    def __init__(self, what: str, index: int | None, name: str | None = None) -> None:
        self.what = what
        self.index = index
        if index is None and what == "gradient":
            message = (
                "The gradient of the combined losses holds NaN or Inf. Nothing was changed. Which objective it comes "
                "from can't be told once the graph is freed: pass retain_graph=True to learn it."
            )
        elif index is None:
            message = (
                f"The {what} holds NaN or Inf although every gradient is finite: the combination overflowed its "
                "dtype. Scale the losses down, or use a wider dtype."
            )
        else:
            label = f"objective {index}" + (f" ({name!r})" if name is not None else "")
            message = (
                f"The {what} of {label} holds NaN or Inf. Nothing was changed: skip this step, lower the learning "
                "rate, or look for a division by zero, log(0) or overflow in that loss."
            )
        super().__init__(message)


class DistributedError(RuntimeError):
    """A collective failed: another rank died, raised an error, or did not answer in time."""


class OptionTypeError(TypeError, ValueError):
    """An option of the wrong type: the message names the option, the value and what is allowed."""
