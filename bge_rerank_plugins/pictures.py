"""Pictures for a user: what cannot be drawn or written is found before anything takes time. Knows nothing of what they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .files import check_writable, whole
from .jsonl import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation


def new_figure(extra: str) -> Figure:
    """An empty figure of the one size that all pictures have.

    Args:
        extra: The extra of this package that brings matplotlib to who asks for this picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'a plot needs matplotlib: pip install "bge-rerank-plugins[{extra}]"') from error

    return Figure(figsize=(8, 4.5), layout="constrained")


def check_picture(flag: str, path: str, extra: str) -> None:
    """Finds what would keep a picture from being saved.

    Raises:
        InputError: The file cannot be written, or its name asks for a format that matplotlib does not have.
        ImportError: matplotlib is not installed.
    """
    check_writable(flag, path)
    formats = {*new_figure(extra).canvas.get_supported_filetypes()} - {"pgf"}  # which needs a TeX to be drawn
    if _format_of(Path(path)) not in formats:
        raise InputError(f"{flag} {path}: {Path(path).suffix} is none of .{', .'.join(sorted(formats))}")


def as_it_stands(name: str) -> str:
    """A name for a picture, whose words between two dollar signs would be a formula."""
    return name.replace("$", r"\$")


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """A legend for the curves of all these axes, outside of them, where it covers none."""
    lines = [line for each in axes for line in each.get_lines()]
    if lines:
        labels = [str(line.get_label()) for line in lines]
        figure.legend(lines, labels, loc="outside upper center", ncols=len(lines), frameon=False)


def labels_apart(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Moves labels down that would lie on points or on earlier labels, once the axes have their limits."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # which says where they are
    point = 3.5 * figure.dpi / 72
    centers = [label.axes.transData.transform(label.xy) for label in labels if label.axes is not None]
    taken = [Bbox([center - point, center + point]) for center in centers]
    for label in labels:
        for _ in range(4 * len(taken)):  # a label whose point is outside has no place, and would be moved for ever
            if not any(label.get_window_extent().overlaps(other) for other in taken):
                break
            x, y = label.xyann
            label.xyann = (x, y - 1.3 * float(label.get_fontsize()))
        taken.append(label.get_window_extent())


def save_picture(figure: Figure, path: str | Path) -> None:
    """Writes a picture in one move, in the format that the file's name asks for; PNG if it asks for none."""
    with whole(Path(path)) as sink:
        figure.savefig(sink, dpi=120, format=_format_of(Path(path)))


def _format_of(path: Path) -> str:
    return path.suffix[1:].lower() or "png"
