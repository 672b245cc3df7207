"""`bge-rerank eval`: from its arguments to the table. Light to import; what measures and scores is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import add_fields, add_settings, fields_of, flag_of, settings_of
from ..demo import PUBLISHED_MODEL
from ..jsonl import InputError
from ..pictures import check_picture, new_figure
from ..scorer import Scorer
from ..settings import RerankSettings
from ..terminal import bar_is_hidden, print_table
from .settings import DEFAULT_TOP_K, STANDARD_LIBRARY, EvaluationSettings

if TYPE_CHECKING:
    from .inputs import JudgedSet, Run

SUMMARY = "Measure rerankers on your own data: quality before and after, significance, time."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bge-rerank eval`."""
    parser.add_argument(
        "data", nargs="?", metavar="DATA", default=None, help=EvaluationSettings.model_fields["data"].description
    )
    parser.add_argument(
        "--models",
        default=PUBLISHED_MODEL,
        metavar="MODEL[,MODEL...]",
        help=f"hub ids or local directories of the rerankers to compare (default: {PUBLISHED_MODEL})",
    )
    add_fields(parser, EvaluationSettings, [name for name in EvaluationSettings.model_fields if name != "data"])
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="keep scores, per-query measures, runs and the plot there; a killed evaluation goes on from them",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="write a picture of quality against time there, PNG unless its name says otherwise",
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs `bge-rerank eval`.

    Raises:
        ValueError: Something cannot be used; the message names it.
    """
    options = fields_of(arguments, EvaluationSettings)
    progress = getattr(arguments, "show_progress", None)
    models = [model.strip() for model in arguments.models.split(",") if model.strip()]
    if not models:
        raise InputError(f"--models={arguments.models!r}: name at least one model")
    from .measures import parse_measures

    # What cannot be done is found before anything that takes time.
    _check_files(arguments)
    _check_options(options)
    parse_measures(options.measures)
    settings = [
        each for model in models for each in _layers(settings_of(arguments, model=model, show_progress=False), options)
    ]
    if options.cutoff_layers is not None and all(each.cutoff_layer is None for each in settings):
        raise InputError(
            f"--cutoff-layers {','.join(map(str, options.cutoff_layers))}: none of the models is layerwise"
        )
    names = _names(settings)
    stage = _stage_name(options, names)
    data = load(options)
    candidates = first_stage(data, options, settings[0])
    _say(
        f"{data.name}: {len(data.queries):,} queries, {len(data.passages):,} passages; "
        f"{stage} found {sum(map(len, candidates.values())):,} candidates."
    )
    from tqdm import tqdm

    from .comparison import evaluate
    from .report import notes, plot, table

    total = len(data.queries) * len(settings)
    with tqdm(total=total, unit=" queries", desc="Reranking", disable=bar_is_hidden(progress)) as bar:
        report = evaluate(
            data,
            candidates,
            _scorers(names, settings),
            measures=options.measures,
            first_stage=stage,
            output=arguments.output,
            advance=bar.update,
        )
    titles, rows = table(report)
    print_table(titles, rows)
    sys.stdout.write("".join(f"{line}\n" for line in notes(report)))
    if arguments.plot is not None:
        plot(report, arguments.plot)
    if arguments.output is not None:
        plot(report, Path(arguments.output) / "plot.png")


def load(options: EvaluationSettings) -> JudgedSet:
    """The judged set that the options name.

    Raises:
        InputError: A file is missing or malformed; the message names it and the line.
    """
    from .inputs import read_beir, read_files, read_rerank_set

    if options.data is None:
        data = read_files(str(options.corpus), str(options.queries), str(options.qrels))
    elif options.data == STANDARD_LIBRARY:
        from .standard_library import standard_library_set

        data = standard_library_set()
    elif Path(options.data).is_dir():
        data = read_beir(options.data, options.split, options.qrels)
    else:
        data = read_rerank_set(options.data)
    if not data.queries:
        raise InputError(f"{options.data}: holds no query")
    return data.sampled(options.sample)


def first_stage(data: JudgedSet, options: EvaluationSettings, settings: RerankSettings) -> Run:
    """The candidates that the options name, best first; an encoder is loaded as the settings say, on the first device."""
    top_k = DEFAULT_TOP_K if options.top_k is None and data.pools is None else options.top_k
    if options.run is not None:
        from .inputs import read_run

        found = read_run(options.run, data)
        return {
            query: [each for each in passages if not (options.ignore_identical_ids and each == query)][:top_k]
            for query, passages in found.items()
        }
    from .first_stage import bm25_run, encoder_run

    if options.first_stage == "bm25":
        return bm25_run(data, top_k, ignore_identical_ids=options.ignore_identical_ids)
    from ..core.device import asked_devices

    return encoder_run(
        data,
        options.first_stage,
        top_k,
        prompt=options.first_stage_prompt,
        ignore_identical_ids=options.ignore_identical_ids,
        device=asked_devices(settings.device)[0],
        cache_dir=settings.cache_dir,
        local_files_only=settings.local_files_only,
        token=settings.token,
    )


def _check_files(arguments: argparse.Namespace) -> None:
    """Raises InputError for data that is not there, and for files that could not be written in the end."""
    data, output = arguments.data, arguments.output
    if data not in (None, STANDARD_LIBRARY) and not Path(data).exists():
        raise InputError(f"{data}: there is no such file or folder; {STANDARD_LIBRARY} needs none")
    if output is not None and (not output or (Path(output).exists() and not Path(output).is_dir())):
        raise InputError(f"--output {output or repr(output)}: that is no directory")
    if arguments.plot is not None:
        check_picture("--plot", arguments.plot, "eval")
    elif output is not None:
        new_figure("eval")  # which is drawn there


def _check_options(options: EvaluationSettings) -> None:
    """Raises InputError for an option that another one leaves without effect."""
    data = options.data
    is_folder = data is not None and data != STANDARD_LIBRARY and Path(data).is_dir()
    unused = (
        ("split", not is_folder, f"goes with a folder in BEIR's layout; {data or '--corpus'} is none"),
        ("split", options.qrels is not None, f"--qrels {options.qrels} takes the place of those in the folder"),
        ("qrels", data is not None and not is_folder, f"goes with a corpus; {data} has its own judgements"),
        ("run", data not in (None, STANDARD_LIBRARY) and not is_folder, f"goes with a corpus; {data} is a rerank set"),
        ("ignore_identical_ids", data is not None and not is_folder, f"goes with a corpus; {data} has ids of its own"),
        ("first_stage", options.run is not None, f"--run {options.run} has the candidates"),
        ("first_stage_prompt", options.first_stage == "bm25", "goes with an encoder; --first-stage is bm25"),
    )
    given = options.model_dump(exclude_unset=True)
    for name, is_unused, why in unused:
        if is_unused and given.get(name) is not None:
            raise InputError(f"{flag_of(name)} {given[name]}: {why}")


def _stage_name(options: EvaluationSettings, names: list[str]) -> str:
    """A short name for the first stage, which no reranker has."""
    is_bm25 = options.run is None and options.first_stage == "bm25"
    path = "BM25" if is_bm25 else options.run or options.first_stage
    return next((name for name in (_short(path), path) if name not in names), f"first stage {_short(path)}")


def _layers(settings: RerankSettings, options: EvaluationSettings) -> list[RerankSettings]:
    """The settings at each layer that was asked for, where the model has layers to choose from.

    Raises:
        ValueError: The model or device cannot be used, as far as can be told without weights.
    """
    from ..core.checkpoint import Checkpoint
    from ..core.device import asked_devices, choose_device, choose_precision
    from ..core.families import family_of

    checkpoint = Checkpoint.from_settings(settings)
    family = family_of(checkpoint)
    for device in asked_devices(settings.device):
        choose_precision(settings.dtype, choose_device(device), float16_is_safe=family.float16_is_safe)
    layers = options.cutoff_layers if family.name == "layerwise" else None
    if layers is not None and settings.cutoff_layer is not None:
        raise InputError(f"--cutoff-layer {settings.cutoff_layer}: --cutoff-layers says which")
    found = [settings] if layers is None else [settings.model_copy(update={"cutoff_layer": each}) for each in layers]
    for each in found:
        family.describe(checkpoint, each)  # fails where loading would
    return found


def _names(settings: list[RerankSettings]) -> list[str]:
    """A short name for each, all different."""
    asked = [(each.model, each.cutoff_layer) for each in settings]
    for model, layer in asked:
        if asked.count((model, layer)) > 1:
            raise InputError(f"--models: {model}{'' if layer is None else f' at layer {layer}'} is named twice")
    short = [_short(model) for model, _ in asked]
    return [
        (name if len({other for other, _ in asked if _short(other) == name}) == 1 else model)
        + ("" if layer is None else f"@{layer}")
        for name, (model, layer) in zip(short, asked, strict=True)
    ]


def _short(path: str) -> str:
    """The last part of a hub id or path; of "." and its like, of the directory that is meant."""
    return os.path.basename(os.path.abspath(path))


def _scorers(names: list[str], settings: list[RerankSettings]) -> Iterator[tuple[str, Any]]:
    """Each scorer when its turn comes, so that only one model is loaded at a time."""
    for name, each in zip(names, settings, strict=True):
        with closing(Scorer.from_settings(each)) as scorer:
            yield name, scorer


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
