"""Shows an evaluation: a table of 80 columns, and a picture of quality against time."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..pictures import as_it_stands, labels_apart, new_figure, save_picture
from .comparison import Report, System

WIDTH = 80
_SHORT = {"RR": "MRR", "AP": "MAP", "Success": "hit"}
"""What users call the measures of ir_measures."""


def table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and rows: measures, the p-value against the first stage, milliseconds a query, pairs a second."""
    titles = ("", *map(short_name, report.measures), "p", "ms", "pairs/s")
    rows = [_row(report, system) for system in report.systems]
    columns = list(zip(titles, *rows, strict=True))[1:]
    room = WIDTH - sum(2 + max(map(len, column)) for column in columns)
    return titles, [(_cut(row[0], max(room, 12)), *row[1:]) for row in rows]


def notes(report: Report) -> list[str]:
    """What a reader of the table must know, in lines."""
    name = short_name(report.measures[0])
    lines = [
        f"The candidates hold {report.recall:.1%} of the relevant passages; reranking cannot find more.",
        f"p: chance of such a difference in {name} from the first line (paired randomisation test).",
        "ms: median time of a query, scored alone.",
    ]
    if missing := report.data.queries_without_relevant:
        lines.append(f"{missing} of the queries have no relevant passage and count 0.")
    best = report.best
    for system in report.systems[1:]:
        if system is not best:
            difference = system.quality.mean[report.measures[0]] - best.quality.mean[report.measures[0]]
            p = report.p_value(system, best)
            lines.append(f"{system.name} against {best.name}: {difference:+.3f} {name}, p {_p(p)}.")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


def plot(report: Report, path: str | Path) -> None:
    """Draws quality against time into a file: one point per reranker, a line for the first stage.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("eval")
    from matplotlib.ticker import LogLocator, NullFormatter

    name = report.measures[0]
    base, *systems = report.systems
    axes = figure.subplots()
    axes.axhline(base.quality.mean[name], color="tab:gray", linestyle="--", label=as_it_stands(base.name))
    timed = [system for system in systems if system.milliseconds is not None]
    labels = []
    for number, system in enumerate(timed):
        point = (system.milliseconds or 0.0, system.quality.mean[name])
        axes.plot(*point, "o", color=f"C{number % 10}", markersize=8)
        labels.append(
            axes.annotate(as_it_stands(system.name), point, xytext=(6, 6), textcoords="offset points", fontsize=9)
        )
    times = [system.milliseconds or 0.0 for system in timed]
    if times:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(times) / 2, max(times) * 4)
    axes.margins(y=0.2)
    axes.set(
        xlabel="milliseconds per query, median",
        ylabel=short_name(name),
        title=f"{as_it_stands(report.data.name)}: quality against time",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    labels_apart(figure, labels)
    save_picture(figure, path)


def short_name(measure: str) -> str:
    """What users call a measure of ir_measures: MRR@10 for RR@10."""
    head, at, cutoff = measure.partition("@")
    return _SHORT.get(head, head) + at + cutoff


def _row(report: Report, system: System) -> tuple[str, ...]:
    milliseconds, speed = system.milliseconds, system.pairs_per_second
    return (
        system.name,
        *(f"{system.quality.mean[name]:.3f}" for name in report.measures),
        "" if system.p_value is None else _p(system.p_value),
        "" if milliseconds is None else f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.1f}",
        "" if speed is None else f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}",
    )


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _cut(name: str, width: int) -> str:
    """A name without its beginning, which tells least, where it is too long."""
    return name if len(name) <= width else ".." + name[2 - width :]
