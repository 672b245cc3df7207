"""The `bge-rerank` command: reads text, asks the package, writes text.

Knows nothing of models; torch is
imported when a command needs it, never for `--help`.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import __version__
from .adapter import AdapterSettings
from .arguments import add_fields, add_settings, flag_of, given, settings_of
from .demo import FRAMEWORKS, PUBLISHED_MODEL, QUERIES
from .evaluation import command as evaluation
from .files import empty, is_regular, opened
from .finetune.command import add_distill, add_finetune, add_mine, run_distill, run_finetune, run_mine
from .jsonl import InputError, Line, check_text, check_texts, json_line, read_all_lines, read_lines
from .pictures import check_picture
from .ranking import RankedPassage, check_cut
from .scorer import Scorer
from .settings import RerankSettings
from .terminal import bar_is_hidden, error_lines, one_line, print_facts, print_table

if TYPE_CHECKING:
    from concurrent.futures import Future

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

UNUSED = {
    "layers": ("cutoff_layer", "normalize"),
    "verify": ("normalize",),
    "export-onnx": (
        *("device", "dtype", "prompt", "cutoff_layer", "normalize", "long_passages"),
        *("max_batch_tokens", "max_queued_tokens", "when_full", "show_progress"),
    ),
}
"""Options of the scorer that would change nothing in a command, which does not take them. `info` checks them all."""

LINES_AHEAD = 8
"""Lines of a regular file that are scored at once, so that a GPU need not wait for the next. A pipe's are taken singly."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `bge-rerank` command.

    Args:
        argv: The arguments; None for those of this process.

    Returns:
        The exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C, 141 when the reader of the output has gone.
    """
    arguments = _parser().parse_args(argv)
    try:
        if sys.stdout is None:
            raise InputError("standard output is closed")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal's encoding lacks
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        with suppress(OSError):  # where it is full
            if sys.stderr is not None:
                sys.stderr.writelines(f"bge-rerank: {message}\n" for message in error_lines(error))
        return BAD_INPUT
    return 0


# The commands. To add one: a function for its arguments, a function that runs it, a row in COMMANDS.


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: What it does, for the help.
        add_arguments: Adds its arguments to its parser.
        run: Does it.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_rerank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help='JSON lines, each {"query": "...", "passages": ["...", ...]} with any other keys; - or nothing for standard input',
    )
    parser.add_argument("--output", default="-", metavar="FILE", help="write there; - or nothing for standard output")
    add_fields(parser, AdapterSettings, ["top_n", "score_threshold"])
    add_settings(parser, default_model=PUBLISHED_MODEL)


def _rerank(arguments: argparse.Namespace) -> None:
    top_n, score_threshold = given(arguments, "top_n"), given(arguments, "score_threshold")
    check_cut(top_n, score_threshold)
    progress = given(arguments, "show_progress")
    settings = settings_of(arguments, show_progress=False)  # one bar over all lines, not one a line
    with (
        opened(arguments.file, arguments.output) as (source, sink),
        ThreadPoolExecutor(LINES_AHEAD) as threads,
        Scorer.from_settings(settings) as scorer,
        _progress_bar(progress) as advance,
    ):
        load = cache(scorer.warmup)  # before the first line that needs it: a model that fails is not the line's fault
        # Not before there is something to put in the place of what a file holds.
        empty_once = cache(partial(empty, sink))

        def submit(line: Line) -> tuple[Line, Future[list[RankedPassage]]]:
            query, passages = line.record["query"], line.record["passages"]
            if passages:
                load()
            return line, threads.submit(scorer.rank, query, passages, top_n, score_threshold)

        ahead = LINES_AHEAD if is_regular(source) else 1
        for line, ranking in _lookahead(_requests(source, arguments.file), submit, ahead):
            try:
                ranked = [passage._asdict() for passage in ranking.result()]
            except (ValueError, RuntimeError) as error:
                raise InputError(f"{line.place}: {error}") from error
            empty_once()
            sink.write(json_line({**line.record, "ranking": ranked}))
            sink.flush()
            advance()
        empty_once()


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    add_settings(parser)


def _info(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    from .core.checkpoint import Checkpoint
    from .core.device import asked_devices, available_devices, choose_device, choose_precision
    from .core.families import family_of

    checkpoint = Checkpoint.from_settings(settings)
    family = family_of(checkpoint)
    facts = {"model": settings.model, "family": family.name}
    facts["architecture"] = ", ".join(checkpoint.config["architectures"])
    if checkpoint.peft_path is not None:
        facts["LoRA adapter"] = checkpoint.peft_path
    facts |= family.describe(checkpoint, settings)
    names = asked_devices(settings.device)
    for number, name in enumerate(names, start=1):
        device = choose_device(name)
        precision = choose_precision(settings.dtype, device, float16_is_safe=family.float16_is_safe)
        why = "asked for" if name else f"the best of this machine, which has {', '.join(available_devices())}"
        which = f" {number}" if len(names) > 1 else ""
        facts[f"device{which}"] = f"{device} ({why})"
        facts[f"dtype{which}"] = f"{str(precision.dtype).removeprefix('torch.')} ({precision.reason})"
    print_facts(facts)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query", help=f"search for this; by default {len(QUERIES)} queries, one after the other")
    parser.add_argument(
        "--framework", choices=FRAMEWORKS, default="langchain", help="adapter to use (default: langchain)"
    )
    parser.add_argument("--candidates", type=int, default=50, metavar="N", help="how many to rerank (default: 50)")
    parser.add_argument("--top-n", type=int, default=10, metavar="N", help="how many to show (default: 10)")
    add_settings(parser, default_model="embedded")


def _demo(arguments: argparse.Namespace) -> None:
    for flag in ("candidates", "top_n"):
        if getattr(arguments, flag) < 1:
            raise InputError(f"{flag_of(flag)}={getattr(arguments, flag)}: expected a whole number from 1")
    settings = settings_of(arguments)
    from .demo import run

    queries = QUERIES if arguments.query is None else (arguments.query,)
    run(queries, settings, arguments.framework, candidates=arguments.candidates, top_n=arguments.top_n)


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSON lines of queries and passages, as for rerank"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="write a picture of the table there, PNG unless its name says otherwise"
    )
    add_settings(parser, without=UNUSED["layers"])


def _layers(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    if arguments.plot is not None:
        check_picture("--plot", arguments.plot, "plot")
    from .core.checkpoint import Checkpoint
    from .core.families import family_of
    from .core.layerwise import layers_of
    from .layers import TOP, compare_layers, plot_layers

    checkpoint = Checkpoint.from_settings(settings)
    if family_of(checkpoint).name != "layerwise":
        raise InputError(
            f"model={settings.model!r}: not a layerwise checkpoint, it has one score and no layer to choose"
        )
    with opened(arguments.data, "-") as (source, _):
        lines = read_all_lines(source, _name(arguments.data), _check_request)
    requests = [(line.record["query"], line.record["passages"]) for line in lines]
    with Scorer.from_settings(settings) as scorer:
        reports = compare_layers(scorer, requests, layers_of(checkpoint))
    print_table(
        ("layer", "Kendall tau", f"top-{TOP} overlap", "ms per pair", "of the top's"),
        [
            (
                str(report.layer),
                "-" if math.isnan(report.tau) else f"{report.tau:.3f}",
                f"{report.overlap:.3f}",
                f"{report.milliseconds:.2f}",
                f"{report.milliseconds / reports[-1].milliseconds:.0%}",
            )
            for report in reports
        ],
    )
    sys.stdout.write(f"tau and overlap: how far the order is that of the top layer, {reports[-1].layer}\n")
    if any(math.isnan(report.tau) for report in reports):
        sys.stdout.write("-: all scores of that layer, or of the top one, are equal; there is no order to compare\n")
    if arguments.plot is not None:
        plot_layers(reports, arguments.plot)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    parser.add_argument("--card", metavar="ID", help="hub id of the model card to compare with (default: MODEL)")
    add_settings(parser, without=UNUSED["verify"])


def _verify(arguments: argparse.Namespace) -> None:
    from .published import TOLERANCE, published_scores, verify

    settings = settings_of(arguments, normalize=False)
    published = published_scores(arguments.card or arguments.model)
    try:
        with Scorer.from_settings(settings) as scorer:
            checks = verify(scorer, published)
    except (ValueError, OSError) as error:
        raise InputError(f"nothing was verified, the model cannot be had: {one_line(error)}") from error
    print_table(
        ("query", "passage", "published", "here", "difference", ""),
        [
            (
                textwrap.shorten(check.published.query, 18),
                textwrap.shorten(check.published.passage, 18),
                f"{check.published.score:.4f}",
                f"{check.score:.4f}",
                f"{abs(check.score - check.published.score):.4f}",
                "ok" if check.holds else "DIFFERS",
            )
            for check in checks
        ],
    )
    if not all(check.holds for check in checks):
        raise InputError(f"model={settings.model!r}: scores differ from the published ones by more than {TOLERANCE}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write it; must be empty or new")
    parser.add_argument("--int8", action="store_true", help="write an int8 graph, too")
    add_settings(parser, without=UNUSED["export-onnx"])


def _export(arguments: argparse.Namespace) -> None:
    from .export import QUANTIZED, export_onnx
    from .onnx import GRAPH

    report = export_onnx(settings_of(arguments), arguments.directory, int8=arguments.int8)
    facts = {GRAPH: f"scores within {report.difference:.0e} of torch's"}
    if report.correlation is not None:
        facts[QUANTIZED] = f"rank correlation {report.correlation:.3f} with torch's scores"
    print_facts(facts)


COMMANDS = {
    "rerank": Command(
        "Order the passages of each line of a file by how well they answer its query.", _add_rerank, _rerank
    ),
    "info": Command("Show what a model is and how it would run here, without loading its weights.", _add_info, _info),
    "layers": Command(
        "Compare the layers of a layerwise model: agreement with the top one, and time.", _add_layers, _layers
    ),
    "verify": Command("Check a model against the scores that its card publishes.", _add_verify, _verify),
    "export-onnx": Command("Write a cross-encoder as an ONNX graph, checked against torch.", _add_export, _export),
    "eval": Command(evaluation.SUMMARY, evaluation.add_arguments, evaluation.run),
    "finetune": Command("Fine-tune a reranker on queries, positives and negatives.", add_finetune, run_finetune),
    "mine": Command("Find hard negatives for the lines of a file.", add_mine, run_mine),
    "distill": Command(
        "Add a teacher's scores to the lines of a file, for finetune to learn from.", add_distill, run_distill
    ),
    "demo": Command("Search the documentation of this Python's standard library: before and after.", _add_demo, _demo),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bge-rerank", description="BGE rerankers on the command line.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        subparser._negative_number_matcher = re.compile(r"-\.?\d")  # as from Python 3.14 on, for -1e-3
        command.add_arguments(subparser)
    return parser


# Lines of queries and passages.


def _check_request(record: dict[str, Any]) -> None:
    check_text(record, "query")
    check_texts(record, "passages")


def _requests(source: BinaryIO, name: str) -> Iterator[Line]:
    return read_lines(source, _name(name), _check_request)


def _name(file: str) -> str:
    return "<stdin>" if file == "-" else file


def _lookahead(
    lines: Iterator[Line], submit: Callable[[Line], tuple[Line, Future[list[RankedPassage]]]], ahead: int
) -> Iterator[tuple[Line, Future[list[RankedPassage]]]]:
    """Submits up to `ahead` lines before the first of them is asked for; an error in a line waits for those before it."""
    submitted: deque[tuple[Line, Future[list[RankedPassage]]]] = deque()
    error: InputError | None = None
    try:
        for line in lines:
            submitted.append(submit(line))
            if len(submitted) >= ahead:
                yield submitted.popleft()
    except InputError as caught:
        error = caught
    yield from submitted
    if error is not None:
        raise error


@contextmanager
def _progress_bar(shown: bool | None) -> Iterator[Callable[[], object]]:
    """A count of lines on standard error; None shows it where that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit=" lines", desc="Reranking", disable=bar_is_hidden(shown)) as bar:
        yield bar.update


def _drop_stdout() -> None:
    """The reader has gone: what Python would still flush when it exits goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
