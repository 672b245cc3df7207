"""The commands `finetune`, `mine` and `distill`: from their arguments to their files. Imports nothing heavy for `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..arguments import add_fields, add_settings, fields_of, settings_of
from ..demo import PUBLISHED_MODEL
from ..files import check_writable, whole
from ..jsonl import InputError, json_line
from ..terminal import bar_is_hidden
from .settings import FinetuneSettings, MineSettings

DATA_HELP = 'JSON lines, each {"query": "...", "pos": ["...", ...], "neg": ["...", ...]}'


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune`."""
    parser.usage = "%(prog)s MODEL --data TEXT --output-dir TEXT [option ...]"  # the options are listed below it anyway
    parser.add_argument("model", metavar="MODEL", help=FinetuneSettings.model_fields["model"].description)
    add_fields(parser, FinetuneSettings, [name for name in FinetuneSettings.model_fields if name != "model"])


def run_finetune(arguments: argparse.Namespace) -> None:
    """Trains, and says where the model is and how to load it."""
    settings = fields_of(arguments, FinetuneSettings)
    from .train import finetune, is_first_process

    result = finetune(settings)
    path = result.output_dir
    load = f"Scorer({settings.model!r}, peft_path={path!r})" if result.is_adapter else f"Scorer({path!r})"
    measured = "" if result.mrr is None else f", held-out MRR {result.mrr:.4f}"
    if is_first_process():
        sys.stdout.write(f"loss {result.loss:.4f}{measured}\n{load}\n")  # the line to load it is to be copied whole


def add_mine(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mine`."""
    _add_files(parser)
    add_fields(parser, MineSettings, MineSettings.model_fields)


def run_mine(arguments: argparse.Namespace) -> None:
    """Writes the data with hard negatives."""
    settings = fields_of(arguments, MineSettings)
    from .mining import mine, read_records

    records = read_records(arguments.file)
    _check_output(arguments.output, arguments.file, settings.corpus)
    mined = mine(records, settings)
    _write(arguments.output, mined)
    few = sum(len(record["neg"]) < settings.negatives for record in mined)
    if few:
        sys.stderr.write(f"bge-rerank: {few} of {len(mined)} lines have fewer than {settings.negatives} negatives\n")
    found_none = all(new["neg"] is old["neg"] for new, old in zip(mined, records, strict=True))
    if found_none and settings.retriever == "bm25":
        sys.stderr.write(
            f"bge-rerank: BM25 found none from place {settings.first} to {settings.last}; "
            "text without spaces between words needs --retriever ENCODER\n"
        )


def add_distill(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `distill`."""
    _add_files(parser)
    add_settings(parser, default_model=PUBLISHED_MODEL)


def run_distill(arguments: argparse.Namespace) -> None:
    """Writes the data with a teacher's scores."""
    settings = settings_of(arguments, show_progress=False)
    from tqdm import tqdm

    from ..scorer import Scorer
    from .distillation import check_prompts, distill
    from .mining import read_records

    records = read_records(arguments.file)
    _check_output(arguments.output, arguments.file)
    check_prompts(records, settings)
    shown = getattr(arguments, "show_progress", None)
    with (
        Scorer.from_settings(settings) as teacher,
        tqdm(total=len(records), unit=" lines", desc="Distilling", disable=bar_is_hidden(shown)) as bar,
    ):
        teacher.warmup()
        _write(arguments.output, _counted(distill(records, teacher), bar.update))


def _counted(records: Iterable[dict[str, Any]], advance: Callable[[], object]) -> Iterator[dict[str, Any]]:
    for record in records:
        yield record
        advance()


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=DATA_HELP)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="where to write the lines; - for standard output"
    )


def _check_output(output: str, *inputs: str | None) -> None:
    if output == "-":
        return
    check_writable("--output", output)
    for file in inputs:
        if file is not None and Path(output).exists() and Path(output).samefile(file):
            raise InputError(f"--output {output}: that is the input {file}, which would be lost")


def _write(output: str, records: Iterable[dict[str, Any]]) -> None:
    """Writes all lines, or none where something fails on the way; to standard output as they come."""
    with nullcontext(sys.stdout.buffer) if output == "-" else whole(Path(output)) as sink:
        for record in records:
            sink.write(json_line(record))
