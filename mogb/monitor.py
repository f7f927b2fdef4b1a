r"""What balancing does to a run: one line of numbers for every step, drawn when you ask.

Of the gradients, a balanced step knows

.. math::

    \|g_k\| , \qquad \cos(g_i, g_j) , \qquad \cos(d, g_k) , \qquad
    \text{stationarity} = \min_{w \ge 0, \, \sum w = 1} \Big\| \sum_k w_k \frac{g_k}{\|g_k\|} \Big\| .

All of them come from the Gramian that the step formed anyway: no backward pass is added, and a step that formed none
(a method that reads losses, a step that reuses weights) has the losses and the weights alone.

Shapes: K = objectives.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch.distributed as dist
from jaxtyping import Float64

from mogb.engines.report import Report
from mogb.solvers.min_norm import solve_min_norm

Record: TypeAlias = dict[str, Any]
MATRIX_UP_TO = 16  # objectives whose cosines are written pair by pair
PAIRS_UP_TO = 8  # objectives for which a dashboard gets them too


class Monitor:
    """Writes what every step's report says, as JSON lines and, if you like, to TensorBoard and Weights & Biases.

    A line holds ``step``, ``names``, ``losses``, ``weights``, ``balanced`` (whether weights were solved at this step),
    ``backward_passes``, ``left_out`` (names), ``residual``, ``converged``, ``note`` and ``skipped``; where gradients
    are known also ``norms``, ``direction_cosines`` with ``min_cosine``, ``mean_cosine`` and ``var_cosine`` over the
    non-zero gradients, ``conflict_rate`` (the share of pairs that conflict), ``stationarity`` (0 to 1, of the unit
    gradients that are not zero), and ``cosines``, the pairs above the diagonal, row by row, up to 16 objectives.
    Numbers have seven digits; what does not exist is null.

    Lines are appended one by one, whole: a run that is killed loses none. In a run of several processes, the first one
    writes.

    Args:
        path: Of the JSON lines; folders are made. None keeps everything in memory, for :meth:`plot`.
        names: Of the objectives, where the losses have none.
        resume: Go on with a file that is there. What it says of steps that the resumed run repeats is dropped.
        tensorboard: A ``SummaryWriter``, or the folder for one.
        wandb: A run of Weights & Biases, or True for the one that ``wandb.init`` started.

    Attributes:
        step: The number of the next step.
        last: The last line; None before the first.

    Raises:
        FileExistsError: There is such a file, and ``resume`` is False.
        ValueError: A file that is damaged before its last line, a folder in place of a file, or names that repeat.
        ImportError: TensorBoard or Weights & Biases is asked for, but not installed.

    Examples:
        >>> import mogb
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> monitor = mogb.Monitor(names=["near", "far"])
        >>> losses = torch.stack([weight.square().sum(), (weight - 3).square().sum()])
        >>> monitor.log(mogb.backward(losses, [weight], mogb.make("upgrad")))["conflict_rate"]
        1.0
        >>> print(monitor)
        step 0 | near 5 (w 0.9) far 5 (w 0.9) | cos(d, g) min +0.316 mean +0.316 | 1 of 1 pairs conflict | stationarity 0.316
    """  # noqa: E501

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        names: Sequence[str] | None = None,
        resume: bool = False,
        tensorboard: Any = None,
        wandb: Any = None,
    ) -> None:
        self.names = None if names is None else _checked_names(names)
        self.path = None if path is None else Path(path)
        self.step = 0
        self.last: Record | None = None
        self._kept: list[Record] = []
        self._file: int | None = None
        self._may_go_back = resume
        self._writes = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self._tensorboard = _tensorboard_writer(tensorboard) if self._writes and tensorboard is not None else None
        self._wandb = _wandb_run(wandb) if self._writes and wandb else None
        if self.path is not None:
            self._look_at(self.path, resume)

    def log(self, report: Report, step: int | None = None) -> Record:
        """Takes down one step, and returns its line.

        Args:
            report: What ``backward`` returned.
            step: Its number; the next one by default. Steps must increase, except that the first one after resuming
                may go back: later lines are dropped.

        Raises:
            TypeError: No report.
            ValueError: A step that does not increase, or a number of losses that differs from that of the names.
        """
        if not isinstance(report, Report):
            raise TypeError(f"report must be what mogb.backward or Balancer.backward returned, but got {report!r}.")
        number = self.step if step is None else _checked_step(step)
        if number < self.step and not self._may_go_back:
            raise ValueError(
                f"step={number} comes after step {self.step - 1}: steps must increase. After a checkpoint is loaded, "
                "make the Monitor with resume=True."
            )
        record = describe(report, number, self.names)
        if self._may_go_back:
            self._drop_from(number)
        if self._writes:
            self._write(record)
        self._may_go_back, self.step, self.last = False, number + 1, record
        return record

    def line(self) -> str:
        """The last step in one line for a terminal."""
        return "nothing logged yet" if self.last is None else as_line(self.last)

    def __str__(self) -> str:
        return self.line()

    def records(self) -> list[Record]:
        """All lines so far."""
        if self.path is None:
            return list(self._kept)
        return [record for record, _ in _read(self.path)] if self.path.exists() else []

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws all lines so far as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There is nothing to draw.
        """
        try:
            from mogb.plotting.monitor import draw_monitor
            from mogb.plotting.style import require_matplotlib

            require_matplotlib()
        except (ImportError, ValueError) as error:
            raise ImportError("Monitor.plot needs matplotlib: pip install 'mogb[plot]'.") from error
        records = self.records()
        if not records:
            raise ValueError("There is nothing to draw: no step was logged.")
        draw_monitor(records, Path(path))
        return Path(path)

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: the number of the next step."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a checkpoint: lines of later steps are dropped when the next one is logged.

        Raises:
            ValueError: No key ``"step"``, or unknown ones.
        """
        if set(state) != {"step"}:
            raise ValueError(f"This is no state of a Monitor: its keys are {', '.join(map(str, state)) or 'none'}.")
        self.step, self._may_go_back = _checked_step(state["step"]), True

    def close(self) -> None:
        """Closes the file, and the TensorBoard writer. Logging again opens them again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_at(self, path: Path, resume: bool) -> None:
        if path.is_dir():
            raise ValueError(f"path must be a file of JSON lines, but {path} is a folder: add a name, monitor.jsonl.")
        if path.exists() and path.stat().st_size:
            if not resume and self._writes:
                raise FileExistsError(
                    f"{path} is there already: pass resume=True to go on with it, remove it, or choose another path."
                )
            found = list(_read(path)) if resume else []
            if found:
                self.last = found[-1][0]
                self.step = self.last["step"] + 1
        path.parent.mkdir(parents=True, exist_ok=True)

    def _drop_from(self, step: int) -> None:
        """Forgets steps that are about to be repeated, and a line that was torn."""
        self._kept = [record for record in self._kept if record["step"] < step]
        if self._writes and self.path is not None and self.path.exists():
            self.close()
            end = max((end for record, end in _read(self.path) if record["step"] < step), default=0)
            os.truncate(self.path, end)

    def _write(self, record: Record) -> None:
        if self.path is None:
            self._kept.append(record)
        else:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
            os.write(self._file, line.encode())  # one call: a line is there, or it is not
        if self._tensorboard is not None or self._wandb is not None:
            scalars = as_scalars(record)
            if self._tensorboard is not None:
                for tag, value in scalars.items():
                    self._tensorboard.add_scalar(tag, value, record["step"])
            if self._wandb is not None:
                self._wandb.log(scalars, step=record["step"])


def describe(report: Report, step: int, names: Sequence[str] | None = None) -> Record:
    """A report as one line of numbers.

    Raises:
        ValueError: A number of losses that differs from that of the names.
    """
    size = len(report.losses)
    names = list(names or report.names or map(str, range(size)))
    if len(names) != size:
        raise ValueError(f"names has {len(names)} entries, {', '.join(names)}, but there are {size} losses.")
    record: Record = {
        "step": step,
        "names": names,
        "losses": _rounded(report.losses.tolist()),
        "weights": None if report.weights is None else _rounded(report.weights.tolist()),
        "balanced": report.refreshed and not report.skipped,
        "backward_passes": report.backward_passes,
        "left_out": [names[index] for index in report.left_out],
        "residual": _number(report.residual),
        "converged": report.converged,
        "note": report.note,
        "skipped": report.skipped,
    }
    if report.gramian is not None and not report.skipped:
        cosines = None if report.cosines is None else report.cosines.numpy()
        record |= _of_gradients(report.gramian.numpy(), cosines, report.conflicts or 0)
    if report.groups:
        record["groups"] = {name: _of_group(part) for name, part in report.groups.items()}
    return record


def as_line(record: Mapping[str, Any]) -> str:
    """A line of numbers as a line of text."""
    weights = record["weights"] or [None] * len(record["names"])
    parts = [
        f"{name} {_text(loss)}" + ("" if weight is None else f" (w {_text(weight, 3)})")
        for name, loss, weight in zip(record["names"], record["losses"], weights, strict=True)
    ]
    told = [f"step {record['step']}", " ".join(parts)]
    if record.get("min_cosine") is not None:
        told.append(f"cos(d, g) min {record['min_cosine']:+.3f} mean {record['mean_cosine']:+.3f}")
    if record.get("conflict_rate") is not None:
        pairs = len(record["names"]) * (len(record["names"]) - 1) // 2
        told.append(f"{round(record['conflict_rate'] * pairs)} of {pairs} pairs conflict")
        told.append(f"stationarity {record['stationarity']:.3f}")
    told += [f"left out: {', '.join(record['left_out'])}"] if record["left_out"] else []
    told += [] if record["converged"] else [f"NOT CONVERGED (residual {_text(record['residual'], 2)})"]
    told += ["reused weights"] if not record["balanced"] and not record["skipped"] else []
    told += ["skipped: gradients overflowed"] if record["skipped"] else []
    told += [record["note"]] if record["note"] else []
    return " | ".join(told)


def as_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of numbers as named scalars, for dashboards. What does not exist is left out."""
    names = record["names"]
    found: dict[str, float | None] = {}
    for key, title in (
        ("losses", "loss"), ("weights", "weight"), ("norms", "gradient norm"), ("direction_cosines", "cos(d, g)"),
    ):  # fmt: skip
        found |= {f"mogb/{title}/{name}": value for name, value in zip(names, record.get(key) or (), strict=False)}
    if len(names) <= PAIRS_UP_TO:
        pairs = (f"mogb/cosine/{a}, {b}" for i, a in enumerate(names) for b in names[i + 1 :])
        found |= dict(zip(pairs, record.get("cosines") or (), strict=False))
    for key in ("min_cosine", "mean_cosine", "var_cosine", "conflict_rate", "stationarity", "residual"):
        found[f"mogb/{key}"] = record.get(key)
    found["mogb/left_out"] = float(len(record["left_out"]))
    return {tag: value for tag, value in found.items() if value is not None}


def _of_gradients(
    gramian: Float64[np.ndarray, "K K"], cosines: Float64[np.ndarray, " K"] | None, conflicts: int
) -> Record:
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    alive = norms > 0
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=alive)
    unit = np.clip(gramian * inverse * inverse[:, None], -1.0, 1.0)
    size = len(norms)
    pairs = size * (size - 1) // 2
    record: Record = {"norms": _rounded(norms.tolist())}
    if cosines is not None:
        some = cosines[alive] if alive.any() else np.zeros(1)
        record["direction_cosines"] = _rounded(cosines.tolist())
        record["min_cosine"], record["mean_cosine"] = _number(some.min()), _number(some.mean())
        record["var_cosine"] = _number(some.var())
    record["conflict_rate"] = _number(conflicts / pairs if pairs else 0.0)
    record["stationarity"] = _number(_stationarity(unit[alive][:, alive] if not alive.all() else unit))
    record["cosines"] = _rounded(unit[np.triu_indices(size, 1)].tolist()) if size <= MATRIX_UP_TO else None
    return record


def _of_group(report: Report) -> Record:
    weights = None if report.weights is None else _rounded(report.weights.tolist())
    return {
        "weights": weights,
        "min_cosine": _number(report.min_cosine),
        "residual": _number(report.residual),
        "left_out": list(report.left_out),
    }


def _stationarity(unit: Float64[np.ndarray, "K K"]) -> float:
    if not len(unit):
        return 0.0
    weights = solve_min_norm(unit).weights
    return math.sqrt(max(float(weights @ unit @ weights), 0.0))


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _text(value: float | None, digits: int = 4) -> str:
    return "nan" if value is None else f"{value:.{digits}g}"


def _read(path: Path) -> Iterator[tuple[Record, int]]:
    """The lines of a file, each with where it ends. A last line without an end was torn, and is left out."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
                record["step"], record["names"], record["losses"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}, is no line of a Monitor: move the file away.") from error
            yield record, end


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(str(name) for name in names)
    if isinstance(names, str) or not found or len(set(found)) < len(found):
        raise ValueError(f"names must be different names, one for each objective, but got {names!r}.")
    return found


def _checked_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"step must be a whole number, at least 0, but got {step!r}.")
    return int(step)


def _tensorboard_writer(given: Any) -> Any:
    if hasattr(given, "add_scalar"):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"tensorboard must be a SummaryWriter or a folder, but got {given!r}.")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard={str(given)!r} needs TensorBoard: pip install tensorboard.") from error
    return SummaryWriter(str(given))


def _wandb_run(given: Any) -> Any:
    if hasattr(given, "log"):
        return given
    if given is not True:
        raise TypeError(f"wandb must be a run or True, but got {given!r}.")
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb=True needs Weights & Biases: pip install wandb.") from error
    if wandb.run is None:
        raise ValueError("wandb=True needs a run: call wandb.init(...) first, or pass the run.")
    return wandb.run
