"""The `bge-rerank` command: reads text, asks the package, writes text.

Its flags are made from the options of `RerankSettings`, so that none is described twice. Knows nothing of models; torch is
imported when a command needs it, never for `--help`.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import os
import shutil
import stat
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from . import __version__
from .adapter import AdapterSettings
from .demo import FRAMEWORKS, PUBLISHED_MODEL, QUERIES
from .ranking import RankedPassage, check_cut
from .scorer import Scorer
from .settings import RerankSettings

if TYPE_CHECKING:
    from concurrent.futures import Future

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

LINES_AHEAD = 8
"""Lines of a regular file that are scored at once, so that a GPU need not wait for the next. A pipe's are taken singly."""


class InputError(ValueError):
    """What was given cannot be used; the message is one line for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `bge-rerank` command.

    Args:
        argv: The arguments; None for those of this process.

    Returns:
        The exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C, 141 when the reader of the output has gone.
    """
    arguments = _parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(f"bge-rerank: {_one_line(error)}\n")
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
    parser.add_argument("--output", metavar="FILE", help="write there instead of to standard output")
    _add_fields(parser, AdapterSettings, ["top_n", "score_threshold"])
    _add_settings(parser, default_model=PUBLISHED_MODEL)


def _rerank(arguments: argparse.Namespace) -> None:
    top_n, score_threshold = _given(arguments, "top_n"), _given(arguments, "score_threshold")
    check_cut(top_n, score_threshold)
    progress = _given(arguments, "show_progress")
    settings = _settings(arguments, show_progress=False)  # one bar over all lines, not one a line
    with (
        _opened(arguments.file, arguments.output) as (source, sink),
        ThreadPoolExecutor(LINES_AHEAD) as threads,
        Scorer.from_settings(settings) as scorer,
        _progress_bar(progress) as advance,
    ):
        load = cache(scorer.warmup)  # before the first line that needs it: a model that fails is not the line's fault

        def submit(line: Line) -> tuple[Line, Future[list[RankedPassage]]]:
            if line.passages:
                load()
            return line, threads.submit(scorer.rank, line.query, line.passages, top_n, score_threshold)

        ahead = LINES_AHEAD if _is_regular(source) else 1
        for line, ranking in _lookahead(_lines(source, arguments.file), submit, ahead):
            try:
                scored = line.with_ranking(ranking.result())
            except (ValueError, RuntimeError) as error:
                raise InputError(f"{line.place}: {error}") from error
            sink.write(scored)
            sink.flush()
            advance()


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    _add_settings(parser)


def _info(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    from .core.checkpoint import Checkpoint
    from .core.device import available_devices, choose_device, choose_precision
    from .core.families import family_of

    checkpoint = Checkpoint.from_settings(settings)
    family = family_of(checkpoint)
    facts = {"model": settings.model, "family": family.name}
    facts["architecture"] = ", ".join(checkpoint.config["architectures"])
    if checkpoint.peft_path is not None:
        facts["LoRA adapter"] = checkpoint.peft_path
    facts |= family.describe(checkpoint, settings)
    names = settings.device if isinstance(settings.device, list) else [settings.device]
    for number, name in enumerate(names, start=1):
        device = choose_device(name)
        precision = choose_precision(settings.dtype, device, float16_is_safe=family.float16_is_safe)
        why = "asked for" if name else f"the best of this machine, which has {', '.join(available_devices())}"
        which = f" {number}" if len(names) > 1 else ""
        facts[f"device{which}"] = f"{device} ({why})"
        facts[f"dtype{which}"] = f"{str(precision.dtype).removeprefix('torch.')} ({precision.reason})"
    _print_facts(facts)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query", help=f"search for this; by default {len(QUERIES)} queries, one after the other")
    parser.add_argument(
        "--framework", choices=FRAMEWORKS, default="langchain", help="adapter to use (default: langchain)"
    )
    parser.add_argument("--candidates", type=int, default=50, metavar="N", help="how many to rerank (default: 50)")
    parser.add_argument("--top-n", type=int, default=10, metavar="N", help="how many to show (default: 10)")
    _add_settings(parser, default_model="embedded")


def _demo(arguments: argparse.Namespace) -> None:
    for flag in ("candidates", "top_n"):
        if getattr(arguments, flag) < 1:
            raise InputError(f"{_flag(flag)}={getattr(arguments, flag)}: expected a whole number from 1")
    settings = _settings(arguments)
    from .demo import run

    queries = QUERIES if arguments.query is None else (arguments.query,)
    run(queries, settings, arguments.framework, candidates=arguments.candidates, top_n=arguments.top_n)


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSON lines of queries and passages, as for rerank"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a PNG picture of the table there")
    _add_settings(parser)


def _layers(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    from .core.checkpoint import Checkpoint
    from .core.families import family_of
    from .core.layerwise import layers_of
    from .layers import TOP, compare_layers, plot_layers

    checkpoint = Checkpoint.from_settings(settings)
    if family_of(checkpoint).name != "layerwise":
        raise InputError(
            f"model={settings.model!r}: not a layerwise checkpoint, it has one score and no layer to choose"
        )
    with _opened(arguments.data, None) as (source, _):
        requests = [(line.query, line.passages) for line in _lines(source, arguments.data)]
    with Scorer.from_settings(settings) as scorer:
        reports = compare_layers(scorer, requests, layers_of(checkpoint))
    _print_table(
        ("layer", "Kendall tau", f"top-{TOP} overlap", "ms per pair", "time"),
        [
            (
                str(report.layer),
                f"{report.tau:.3f}",
                f"{report.overlap:.3f}",
                f"{report.milliseconds:.2f}",
                f"{report.milliseconds / reports[-1].milliseconds:.0%}",
            )
            for report in reports
        ],
    )
    if arguments.plot is not None:
        plot_layers(reports, arguments.plot)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=RerankSettings.model_fields["model"].description)
    parser.add_argument("--card", metavar="ID", help="hub id of the model card to compare with (default: MODEL)")
    _add_settings(parser)


def _verify(arguments: argparse.Namespace) -> None:
    from .published import TOLERANCE, published_scores, verify

    settings = _settings(arguments, normalize=False)
    published = published_scores(arguments.card or arguments.model)
    try:
        with Scorer.from_settings(settings) as scorer:
            checks = verify(scorer, published)
    except (ValueError, OSError) as error:
        raise InputError(f"nothing was verified, the model cannot be had: {_one_line(error)}") from error
    _print_table(
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


COMMANDS = {
    "rerank": Command(
        "Order the passages of each line of a file by how well they answer its query.", _add_rerank, _rerank
    ),
    "info": Command("Show what a model is and how it would run here, without loading its weights.", _add_info, _info),
    "layers": Command(
        "Compare the layers of a layerwise model: agreement with the top one, and time.", _add_layers, _layers
    ),
    "verify": Command("Check a model against the scores that its card publishes.", _add_verify, _verify),
    "demo": Command("Search the documentation of this Python's standard library: before and after.", _add_demo, _demo),
}


# Arguments, from the fields of a pydantic model.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bge-rerank", description="BGE rerankers on the command line.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        command.add_arguments(subparser)
    return parser


def _add_settings(parser: argparse.ArgumentParser, default_model: str | None = None) -> None:
    """Adds a flag for every option of `RerankSettings`; one for the model only where it has a default."""
    group = parser.add_argument_group("model and scoring")
    if default_model is not None:
        description = RerankSettings.model_fields["model"].description
        group.add_argument("--model", default=default_model, help=f"{description} (default: {default_model})")
    _add_fields(group, RerankSettings, [name for name in RerankSettings.model_fields if name != "model"])


def _add_fields(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, model: type[BaseModel], names: Iterable[str]
) -> None:
    """Adds a flag for each of these fields. What is not given on the command line stays out of the namespace."""
    for name in names:
        field = model.model_fields[name]
        text = (field.description or "").replace("%", "%%")
        if field.default not in (None, False, ""):
            text += f" (default: {field.default})"
        parser.add_argument(
            _flag(name), dest=name, default=argparse.SUPPRESS, help=text, **_flag_kind(field.annotation)
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flag_kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if any(get_origin(kind) is list for kind in kinds):
        return {"type": _one_or_list, "metavar": "X[,X...]"}
    return {"type": kinds[0], "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}


def _one_or_list(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text


def _given(arguments: argparse.Namespace, name: str) -> Any:
    return getattr(arguments, name, None)


def _settings(arguments: argparse.Namespace, **fixed: Any) -> RerankSettings:
    given = {name: value for name, value in vars(arguments).items() if name in RerankSettings.model_fields}
    return RerankSettings(**(given | fixed))


# JSON lines.


@dataclass(frozen=True)
class Line:
    """One line of input.

    Attributes:
        place: The file and the line's number, for messages.
        record: The JSON object, its extra keys too.
    """

    place: str
    record: dict[str, Any]

    @property
    def query(self) -> str:
        """What is asked."""
        query: str = self.record["query"]
        return query

    @property
    def passages(self) -> list[str]:
        """What may answer it."""
        passages: list[str] = self.record["passages"]
        return passages

    def with_ranking(self, ranking: Iterable[RankedPassage]) -> bytes:
        """The line of output."""
        return _json_line({**self.record, "ranking": [passage._asdict() for passage in ranking]})


def _lines(source: BinaryIO, name: str) -> Iterator[Line]:
    """Reads lines one by one; blank ones are skipped.

    Raises:
        InputError: A malformed line; the message tells the file, the line's number and why.
    """
    for number, raw in enumerate(source, start=1):
        text = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip()
        if not text:
            continue
        place = f"{'<stdin>' if name == '-' else name}:{number}"
        try:
            yield Line(place, _record(text))
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error


def _record(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with query and passages, got {_json_kind(record)}")
    for key in ("query", "passages"):
        if key not in record:
            raise ValueError(f'no "{key}"')
    if not isinstance(record["query"], str):
        raise ValueError(f'"query" is {_json_kind(record["query"])}, expected a string')
    if not isinstance(record["passages"], list):
        raise ValueError(f'"passages" is {_json_kind(record["passages"])}, expected an array of strings')
    for index, passage in enumerate(record["passages"]):
        if not isinstance(passage, str):
            raise ValueError(f'"passages"[{index}] is {_json_kind(passage)}, expected a string')
    try:
        _json_line(record)
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode text: half of a surrogate pair, {error.object[error.start]!a}") from error
    return record


def _json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _json_kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", NoneType: "null"}
    return kinds.get(type(value), "a number")


def _no_constant(text: str) -> float:
    raise ValueError(f"not JSON: {text}")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond a 64-bit float")
    return number


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
def _opened(file: str, output: str | None) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The input and the output, as bytes: both are UTF-8 whatever the terminal's encoding."""
    if output is not None and file != "-" and Path(output).exists() and Path(output).samefile(file):
        raise InputError(f"--output {output}: that is the input, which would be lost")
    source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115
    try:
        sink = sys.stdout.buffer if output is None else Path(output).open("wb")  # noqa: SIM115
        try:
            yield source, sink
        finally:
            if output is not None:
                sink.close()
    finally:
        if file != "-":
            source.close()


def _is_regular(source: BinaryIO) -> bool:
    """Whether reading never waits for somebody to write."""
    try:
        return stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:  # not a file of the operating system
        return False


# Output for people.


@contextmanager
def _progress_bar(shown: bool | None) -> Iterator[Callable[[], object]]:
    """A count of lines on standard error; None shows it where that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit=" lines", desc="Reranking", disable=None if shown is None else not shown) as bar:
        yield bar.update


def _print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts)) + 2
    columns = max(shutil.get_terminal_size().columns, width + 30)
    for name, value in facts.items():
        lines = textwrap.wrap(
            value, columns, initial_indent=name.ljust(width), subsequent_indent=" " * width, break_long_words=False
        )
        sys.stdout.write("\n".join(lines) + "\n")


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns; the first is left-aligned, and so is what is no number."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = [
            cell.ljust(width) if cell[:1].isalpha() else cell.rjust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(map(_option_message, error.errors()))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _option_message(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    name = ".".join(map(str, error["loc"]))
    return message if not name or message.startswith(f"{name}=") else f"{name}={error['input']!r}: {message}"


def _drop_stdout() -> None:
    """The reader has gone: what Python would still flush when it exits goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
