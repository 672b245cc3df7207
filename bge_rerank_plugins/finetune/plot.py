"""The picture of a training run: loss and held-out MRR over the steps. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pictures import legend_above, new_figure, save_picture


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
    curves = ((losses, "loss", "-", "tab:blue", "loss"), (measured, "eval_mrr", "o-", "tab:green", "held-out MRR"))
    for axes, key, style, color, label in curves:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label)
        axes.set_ylabel(label)
    losses.set_xlabel("step")
    losses.grid(alpha=0.3)
    measured.set_ylim(0, 1.02)
    legend_above(figure, [losses, measured])
    save_picture(figure, path)
    return True
