"""The exceptions that mogb raises on purpose, beside ValueError and TypeError."""


class NonFiniteError(ValueError):
    """A loss, a gradient or a direction holds NaN or Inf.

    Attributes:
        index: The position of the offending objective; None when only the combination overflowed.
        what: ``"loss"``, ``"gradient"`` or ``"direction"``.
    """

    def __init__(self, what: str, index: int | None, name: str | None = None) -> None:
        self.what = what
        self.index = index
        if index is None:
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
