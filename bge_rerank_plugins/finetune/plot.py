"""The picture of a training run: loss and held-out MRR over the steps. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..pictures import legend_above, new_figure, save_picture

SMOOTHED = 10
"""Points of the loss that are averaged."""


def plot_training(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws loss and MRR into a PNG file, where matplotlib is installed.

    Args:
        history: Entries with "step", and "loss" or "eval_mrr".
        path: The file.

    Returns:
        Whether there is a picture.
    """
    try:
        figure = new_figure("finetune")
    except ImportError:
        return False
    losses = figure.subplots()
    measured = losses.twinx()
    if points := _points(history, "loss"):
        losses.plot(*zip(*points, strict=True), color="tab:blue", alpha=0.3, label="loss")
        losses.plot(*zip(*_smoothed(points), strict=True), color="tab:blue", label=f"its mean over {SMOOTHED} points")
    if points := _points(history, "eval_mrr"):
        measured.plot(*zip(*points, strict=True), "o-", color="tab:green", label="held-out MRR")
    losses.set(xlabel="step", ylabel="loss")
    losses.grid(alpha=0.3)
    measured.set(ylabel="held-out MRR", ylim=(0, 1.02))
    legend_above(figure, [losses, measured])
    save_picture(figure, path)
    return True


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each point as the mean of the last ones: the loss of single steps is mostly that of what they happen to draw."""
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, i + 1 - SMOOTHED) : i + 1])) for i, (step, _) in enumerate(points)]
