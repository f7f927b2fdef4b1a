"""What a run writes while it goes on: ``metrics.jsonl`` always, TensorBoard and Weights & Biases if asked, pictures.

Every line of ``metrics.jsonl`` has a ``kind`` (``epoch``, ``step`` or ``evaluation``), the ``epoch`` and the ``step``.
Wall times are under ``seconds`` and nowhere else: without them, two runs of one configuration are equal line by line.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogb_diffusion import config
from mogb_diffusion.errors import InputError

METRICS = "metrics.jsonl"


class Tracker:
    """Writes the lines of one run.

    Args:
        folder: Of the run.
        settings: What else is written.
        title: Of the run, for W&B.
        keep: Lines of an earlier part of the run that are kept; later ones are cut off.

    Attributes:
        lines: In the file so far.
    """

    def __init__(self, folder: Path, settings: config.Tracking, title: str = "run", *, keep: int = 0) -> None:
        self.folder = folder
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        self._writers = list(_writers(folder, settings, title))
        kept = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
        staging = path.with_suffix(".new")
        staging.write_text("".join(kept))
        staging.replace(path)
        self.lines = len(kept)
        self._file = path.open("a")

    def log(self, kind: str, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite become null."""
        self._file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step} | _valid(dict(values))) + "\n")
        self._file.flush()
        self.lines += 1
        for write in self._writers:
            write({f"{kind}/{name}": value for name, value in _scalars(values)}, step)

    def save_grid(self, images: Tensor, name: str, *, columns: int = 8, scale: int | None = None) -> Path:
        """Writes pictures ``[B, 3, H, W]`` as ``samples/<name>.png``, small ones enlarged without blur."""
        path = self.folder / "samples" / f"{name}.png"
        save_grid(images, path, columns=columns, scale=scale)
        return path

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        for write in self._writers:
            write({}, -1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run; a last one that is torn is left out.

    Raises:
        InputError: There are none.
    """
    path = folder / METRICS
    if not path.exists():
        raise InputError(f"{folder} is no folder of a run: it has no {METRICS}.")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # noqa: PERF203 - a torn line must not hide the others
            if line.endswith("}"):
                raise InputError(f"{path}:{number}: this is no JSON: {error}.") from None
    return rows


def save_grid(images: Tensor, path: Path, *, columns: int = 8, scale: int | None = None) -> None:
    """Writes pictures ``[B, 3, H, W]`` in rows of ``columns``, on light grey."""
    from PIL import Image

    count, _, height, width = images.shape
    factor = scale or max(1, 96 // height)
    columns = min(columns, count)
    gap, rows = max(2, factor), -(-count // columns)
    cell_h, cell_w = height * factor + gap, width * factor + gap
    sheet = torch.full((3, rows * cell_h + gap, columns * cell_w + gap), 0.85)
    large = images.float().cpu().clamp(0, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    for n, image in enumerate(large):
        top, left = gap + n // columns * cell_h, gap + n % columns * cell_w
        sheet[:, top : top + height * factor, left : left + width * factor] = image
    pixels = (sheet * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def check_packages(settings: config.Tracking) -> None:
    """That what the settings ask for is installed; nothing is written.

    Raises:
        InputError: It is not.
    """
    for wanted, package, module in (
        (settings.tensorboard, "tensorboard", "torch.utils.tensorboard"),
        (settings.wandb is not None, "wandb", "wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(module)
            except ImportError:
                raise InputError(
                    f"tracking.{package}: needs {package}. Install it with: pip install 'mogb[{package}]'"
                ) from None


def _writers(folder: Path, settings: config.Tracking, title: str) -> Iterator[Any]:
    check_packages(settings)
    if settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(str(folder / "tensorboard"))

        def write_events(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)
            if step < 0:
                events.close()

        yield write_events
    if settings.wandb is not None:
        import wandb

        session = wandb.init(project=settings.wandb, name=title, dir=str(folder))

        def write_wandb(values: Mapping[str, float], step: int) -> None:
            if step < 0:
                session.finish()
            else:
                session.log(dict(values), step=step)

        yield write_wandb
