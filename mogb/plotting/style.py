"""How figures look: palette, fonts, grids of small panels. The only place that imports matplotlib."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogb.compare.plan import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Okabe and Ito's palette, which survives the common colour deficiencies, without its yellow; dark to light.
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#111111",
)  # fmt: skip
HUES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
GREY, PALE = "#666666", "#DDDDDD"
DPI = 120
_FONT: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8.5, "axes.edgecolor": GREY, "axes.linewidth": 0.7, "xtick.color": GREY, "ytick.color": GREY,
    "axes.titleweight": "bold", "axes.formatter.limits": (-3, 4), "axes.unicode_minus": True, "figure.dpi": DPI,
    "axes.formatter.useoffset": False, "font.family": "DejaVu Sans",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        path: The PNG file.
        section: Under which heading a report shows it.
        title: A short one.
        caption: What is to be seen, and how to read it.
    """

    path: Path
    section: str
    title: str
    caption: str


@dataclass(frozen=True)
class Panels:
    """A grid with one panel per method and one free cell for the legend.

    Attributes:
        figure: The whole.
        axes: One per method.
        legend: The free cell, without axes.
    """

    figure: "Figure"
    axes: "list[Axes]"
    legend: "Axes"


def require_matplotlib() -> None:
    """Says what to install, before hours are spent on numbers that cannot be drawn.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "figures need matplotlib: pip install 'mogb[plot]', or add --no-figures for tables alone."
        ) from error


@contextmanager
def styled() -> Iterator[None]:
    """The look of all figures, without a trace in the user's own settings."""
    import matplotlib

    with matplotlib.rc_context(_FONT):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """A figure of its own, drawn by Agg: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes a PNG without the date and version that would make equal figures differ."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def panels(count: int, *, share: bool = True, aspect: float = 1.0, projection: str | None = None) -> Panels:
    """A grid for ``count`` panels and a legend, at most five wide.

    Args:
        count: Of panels.
        share: Whether all panels have the same limits, so that only the outer ones need numbers.
        aspect: Height over width of a panel.
        projection: ``"3d"`` or None.
    """
    columns = min(5, count + 1)
    rows = -(-(count + 1) // columns)
    side, gap = 2.35, 0.32
    width = columns * side + (0 if share else columns * 0.25) + 0.8
    height = rows * (side * aspect + gap) + 0.75
    figure = new_figure(width, height)
    grid = figure.add_gridspec(
        rows, columns, left=0.62 / width, right=1 - 0.12 / width, bottom=0.52 / height, top=1 - 0.62 / height,
        wspace=0.07 if share else 0.24, hspace=gap / (side * aspect) + (0.03 if share else 0.1),
    )  # fmt: skip
    axes: list[Axes] = []
    for index in range(count):
        first = axes[0] if axes and share and projection is None else None
        axis: Any = figure.add_subplot(
            grid[index // columns, index % columns], sharex=first, sharey=first, projection=projection
        )
        if share and projection is None:
            axis.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= count)
        axes.append(axis)
    legend = figure.add_subplot(grid[count // columns, count % columns])
    legend.axis("off")
    return Panels(figure, axes, legend)


def headline(figure: "Figure", title: str, subtitle: str = "") -> None:
    """A title at the top left, and a quieter line beside it, as large as there is room for."""
    height = figure.get_size_inches()[1]
    text = figure.text(0.012, 1 - 0.12 / height, title, ha="left", va="top", fontsize=12, fontweight="bold")
    left = _right_edge(figure, text) + 0.012
    quiet = figure.text(left, 1 - 0.135 / height, subtitle, ha="left", va="top", fontsize=9.5, color=GREY)
    needed = _right_edge(figure, quiet) - left
    quiet.set_fontsize(9.5 * min(1.0, max(0.0, 0.985 - left) / max(needed, 1e-9)))


def _right_edge(figure: "Figure", text: "Text") -> float:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return text.get_window_extent(renderer).transformed(figure.transFigure.inverted()).x1


def few_ticks(axis: "Axes") -> None:
    """Numbers that do not run into those of the neighbouring panel."""
    from matplotlib.ticker import MaxNLocator

    axis.ticklabel_format(axis="x", style="plain")
    axis.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
    axis.yaxis.set_major_locator(MaxNLocator(6))


def label_outer(found: Panels, x: str, y: str) -> None:
    """One label for all horizontal axes, one for all vertical ones."""
    figure = found.figure
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.1 / height, x, ha="center", va="bottom", fontsize=10)
    figure.text(0.08 / width, 0.5, y, ha="left", va="center", rotation="vertical", fontsize=10)


def top_margin(names: Iterable[str]) -> float:
    """Inches for a headline and slanted column names."""
    return 0.6 + 0.058 * max(map(len, names))
