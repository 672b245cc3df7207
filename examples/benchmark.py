"""Speed of this package beside what a user could pick instead: same checkpoint, same documents, in turns.

    python examples/benchmark.py                      # encoder, float32, three workloads
    python examples/benchmark.py --family decoder     # or layerwise
    python examples/benchmark.py --load               # many requests at once, on the embedded model
    python examples/benchmark.py --dtype bfloat16 --device cuda --size full --json results.json --plot results.png

Checkpoints are random, of the real architectures: speed does not depend on what the weights say. Documents are docstrings of
the standard library. Every contender has a process of its own and scores every workload several times, in turns, so that a
noisy machine is unfair to nobody; the table shows medians and ratios. The machine's ceiling is a matrix product of the model's
own shapes and precision, measured in the same run. A peer that is not installed is skipped by name.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmark_load import show_load
from benchmark_models import FAMILIES, Shape, make_checkpoint
from benchmark_peers import BFLOAT16, CONTENDERS, CUTOFF, OURS, PeerMissing
from benchmark_process import Contender
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from bge_rerank_plugins.core.device import choose_device
from bge_rerank_plugins.core.linear import PackedLinear, can_pack
from bge_rerank_plugins.docstrings import standard_library
from bge_rerank_plugins.files import check_writable
from bge_rerank_plugins.pictures import check_picture, save_picture
from bge_rerank_plugins.settings import RerankSettings

_T = TypeVar("_T")

QUERY = "How do I read a file line by line without loading all of it into memory?"

QUERY_LENGTHS = (20, 300)
"""Tokens of the queries that LLM rerankers get, whose passages share them."""

MORE_WARMUPS = 5
"""Requests before those that are timed where they take milliseconds: graphs are captured, and kernels chosen, on the way."""


@dataclass(frozen=True)
class Workload:
    """A request that is scored again and again."""

    name: str
    query: str
    passages: list[str]


@dataclass(frozen=True)
class Result:
    """What one contender did with one workload."""

    workload: str
    contender: str
    pairs: int
    tokens: int
    seconds: list[float]
    tflop: float
    ceiling_tflops: float | None
    difference: float

    @property
    def median(self) -> float:
        """Median seconds of a request."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the requests stay under; of few runs, the slowest."""
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]

    @property
    def share(self) -> float | None:
        """Share of the ceiling: work that must be done, so that padding and repeated queries count against whoever has them.

        None in int8, whose ceiling is not measured.
        """
        return None if self.ceiling_tflops is None else self.tflop / self.median / self.ceiling_tflops


def main() -> None:
    """Runs the benchmark and prints the table."""
    options = _options()
    if options.load:
        show_load("embedded", options.device, options.dtype, count=1000, runs=options.runs)
        return
    console = Console()
    documents = _documents()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        shape = FAMILIES[options.family].shapes[options.size]
        dtype: torch.dtype = getattr(torch, options.dtype)
        directory = make_checkpoint(options.family, shape, Path(folder), dtype, options.tokenizer)
        asked = options.workload or _workload_names(options)
        workloads = [workload for workload in _workloads(options, documents, directory) if workload.name in asked]
        ceiling = _ceiling(shape, options.device, dtype)
        console.print(
            f"{options.family}, {shape.layers} x {shape.hidden}, {options.dtype} on {_machine(options.device)}; "
            f"ceiling {ceiling:.3f} TFLOP/s; {', '.join(_versions())}",
            style="bold",
        )
        with ExitStack() as stack:
            contenders = _contenders(options, directory, console, stack)
            ceilings = {name: None if name.endswith("int8") else ceiling for name in contenders}
            if BFLOAT16 in contenders:
                ceilings[BFLOAT16] = _ceiling(shape, options.device, torch.bfloat16)
            for workload in workloads:
                rows = _in_turns(workload, contenders, options, directory, shape, ceilings, console)
                _show(console, rows)
                results += rows
                if options.json:  # after each, lest a run that breaks off loses all
                    _write(results, options)
    if options.plot:
        _plot(results, f"{options.family}, {options.dtype}, {_machine(options.device)}", options.plot)


def _write(results: list[Result], options: argparse.Namespace) -> None:
    facts = {
        "machine": _machine(options.device),
        "versions": _versions(),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "plot", "tokenizer")},
        "date": time.strftime("%F"),
    }
    rows = [asdict(result) | {"median": result.median, "share": result.share} for result in results]
    Path(options.json).write_text(json.dumps(facts | {"results": rows}, indent=1) + "\n")


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="encoder")
    parser.add_argument(
        "--size", choices=("bench", "full"), default="bench", help="full: the published shape, for a GPU"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="times that each contender scores each workload")
    parser.add_argument("--workload", action="append", help="name of a workload; all by default")
    parser.add_argument("--peer", action="append", help="name of a peer; all by default, 'none' for none")
    parser.add_argument("--load", action="store_true", help="many requests at once against one after another, instead")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json for cross-encoders, where the extra demo is not installed"
    )
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="PNG file for a picture of them (matplotlib)")
    options = parser.parse_args(arguments)
    for name in ("family", "size", "workload", "peer", "tokenizer", "json", "plot") if options.load else ():
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} is not for --load")
    try:
        _check(options)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    """Finds what cannot be done before anything takes time."""
    if options.runs < 1:
        raise ValueError(f"--runs {options.runs}: at least 1")
    known = [*CONTENDERS[options.family], "none"]
    for peer in options.peer or ():
        if peer not in known:
            raise ValueError(f"--peer {peer!r}: none of {', '.join(map(repr, known))}")
    workloads = _workload_names(options)
    for workload in options.workload or ():
        if workload not in workloads:
            raise ValueError(f"--workload {workload!r}: none of {', '.join(map(repr, workloads))}")
    choose_device(str(RerankSettings(model="-", device=options.device).device))
    if options.tokenizer is not None and options.family != "encoder":
        raise ValueError(
            f"--tokenizer {options.tokenizer}: for cross-encoders; --family {options.family} makes its own"
        )
    if options.tokenizer is not None and not options.tokenizer.is_file():
        raise FileNotFoundError(f"--tokenizer {options.tokenizer}: no such file")
    if options.json is not None:
        check_writable("--json", options.json)
    if options.plot is not None:
        check_picture("--plot", options.plot, "plot")


def _documents() -> list[str]:
    """Docstrings of the standard library in a fixed order that is not the alphabet's, so that lengths are mixed."""
    documents = [f"{docstring.name}: {docstring.text}" for docstring in standard_library() if len(docstring.text) > 120]
    return [documents[i * 7919 % len(documents)] for i in range(len(documents))]


def _workload_names(options: argparse.Namespace) -> list[str]:
    """Names of `_workloads`, known before there is a checkpoint."""
    if options.family != "encoder":
        return [f"50 docstrings, query of {length}" for length in QUERY_LENGTHS]
    return ["20 short", "100 docstrings", "100 x 512", *(["100 x 128"] if options.device != "cpu" else [])]


def _workloads(options: argparse.Namespace, documents: list[str], directory: Path) -> Iterator[Workload]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()

    def cut(text: str, tokens: int) -> str:
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:tokens]))

    if options.family == "encoder":
        yield Workload("20 short", QUERY, [document[:200] for document in documents[:20]])
        yield Workload("100 docstrings", QUERY, [document[:4000] for document in documents[:100]])
        yield Workload("100 x 512", QUERY, [cut(" ".join(documents[i : i + 20]), 510) for i in range(100)])
        if options.device != "cpu":  # where it is a matter of milliseconds, and of whatever is not the device's work
            yield Workload("100 x 128", QUERY, [cut(" ".join(documents[i : i + 20]), 128) for i in range(100)])
    else:
        for length in QUERY_LENGTHS:
            query = cut(" ".join(documents[200:260]), length)
            yield Workload(f"50 docstrings, query of {length}", query, [document[:600] for document in documents[:50]])


def _contenders(
    options: argparse.Namespace, directory: Path, console: Console, stack: ExitStack
) -> dict[str, Contender]:
    contenders = {}
    for name in CONTENDERS[options.family]:
        if options.peer and name not in (*options.peer, OURS, CUTOFF):
            continue
        prepare = partial(Contender, options.family, name, directory, options.dtype, options.device)
        if (contender := _tried(name, prepare, console)) is not None:
            contenders[name] = stack.enter_context(contender)
    return contenders


def _tried(name: str, work: Callable[[], _T], console: Console) -> _T | None:
    """What a contender does; None, and a line that says why, for a peer that is missing or fails."""
    try:
        return work()
    except PeerMissing as missing:
        console.print(f"skipped: {name} ({missing})", style="yellow", markup=False)  # extras stand in brackets
    except Exception as error:  # of whatever kind a peer raises
        if name == OURS:
            raise
        console.print(f"failed: {name} ({error!r})", style="red", markup=False)
    return None


def _in_turns(
    workload: Workload,
    contenders: dict[str, Contender],
    options: argparse.Namespace,
    directory: Path,
    shape: Shape,
    ceilings: dict[str, float | None],
    console: Console,
) -> list[Result]:
    """Every contender to warm up, then all of them in turns; a peer that fails is left out, by name."""
    lengths, prefix = _lengths(directory, options.family, workload)
    flop = [shape.necessary_flop(length, prefix) for length in lengths]
    tflop = (flop[0][0] + sum(own for _, own in flop)) / 1e12  # the query once
    score = {
        name: partial(contender.score, workload.query, workload.passages) for name, contender in contenders.items()
    }
    first = {name: _tried(name, score[name], console) for name in score}
    scores = {name: found[0] for name, found in first.items() if found is not None}
    for _ in range(0 if options.device == "cpu" else MORE_WARMUPS):
        for name in scores:
            score[name]()
    seconds: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(options.runs):
        for name in scores:
            seconds[name].append(score[name]()[1])
    ours = scores[OURS]
    return [
        Result(
            workload=workload.name,
            contender=name,
            pairs=len(workload.passages),
            tokens=sum(lengths),
            seconds=seconds[name],
            tflop=tflop * (28 / 40 if name == CUTOFF else 1),
            ceiling_tflops=ceilings[name],
            difference=max(abs(a - b) for a, b in zip(ours, scores[name], strict=True)),
        )
        for name in scores
    ]


def _lengths(directory: Path, family: str, workload: Workload) -> tuple[list[int], int]:
    """Tokens of each pair, the prompt and the query included, and how many of them a pair shares with the others."""
    from bge_rerank_plugins import RerankSettings
    from bge_rerank_plugins.core.checkpoint import Checkpoint
    from bge_rerank_plugins.core.pairs import PairTemplate
    from bge_rerank_plugins.core.prompt import Prompt
    from bge_rerank_plugins.core.tokenizer import load_tokenizer

    settings = RerankSettings(model=str(directory))
    checkpoint = Checkpoint.from_settings(settings)
    if family != "encoder":
        sequences = Prompt(checkpoint, settings, 8192).encode(workload.query, workload.passages)
        return [len(sequence) for sequence in sequences], sequences[0].prefix
    tokenizer: Any = load_tokenizer(checkpoint).backend_tokenizer
    special = len(PairTemplate.of(tokenizer))
    texts = tokenizer.encode_batch([workload.query, *workload.passages], add_special_tokens=False)
    query, *passages = (len(encoding.ids) for encoding in texts)
    return [min(512, special + query + passage) for passage in passages], 0


def _ceiling(shape: Shape, device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of the products of the model's layers, the best of many of each, on random data.

    By torch's own product, or on a CPU by oneDNN's of weights that it has laid out, whichever is faster here.
    """
    rows = 2048 if device == "cpu" else 16384
    flop = seconds = 0.0
    with torch.inference_mode():
        for inputs, outputs, count in shape.products():
            left = torch.randn(rows, inputs, device=device).to(dtype)
            layer = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
            layers = [layer, PackedLinear(layer)] if device == "cpu" and can_pack(dtype) else [layer]
            times = 1 if device == "cpu" else 20
            seconds += count * min(_timed(left, product, times) for _ in range(20) for product in layers)
            flop += count * 2 * rows * inputs * outputs
    return flop / seconds / 1e12


def _timed(left: torch.Tensor, layer: torch.nn.Module, times: int) -> float:
    """Seconds of one product; of several in a row where each is so short that to launch it and to wait would count."""
    start = time.perf_counter()
    for _ in range(times):
        layer(left)
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    return (time.perf_counter() - start) / times


def _show(console: Console, rows: list[Result]) -> None:
    """The table of a workload, readable at 80 columns."""
    ours = rows[0]
    title = f"{ours.workload}: {ours.pairs} pairs, {ours.tokens} tokens, {ours.tflop:.2f} TFLOP"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in ("p50 s", "p95 s", "pairs\n/s", "tokens\n/s", "of the\nceiling", "we are\nfaster", "scores\ndiffer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        beside = () if row is ours else (f"{row.median / ours.median:#.3g} x", f"{row.difference:.0e}")
        table.add_row(
            row.contender,
            *(f"{seconds:.3f}" if seconds < 100 else f"{seconds:.1f}" for seconds in (row.median, row.p95)),
            f"{row.pairs / row.median:.1f}",
            f"{row.tokens / row.median:.0f}",
            "-" if row.share is None else f"{row.share:.0%}",
            *beside,
        )
    console.print(table)


def _plot(results: list[Result], title: str, path: str) -> None:
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(result.workload for result in results))
    figure, axes = plt.subplots(1, len(workloads), figsize=(5 * len(workloads), 4), layout="constrained")
    for axis, workload in zip([axes] if len(workloads) == 1 else axes, workloads, strict=True):
        rows = sorted((r for r in results if r.workload == workload), key=lambda r: -r.median)
        colors = ["tab:blue" if row.contender.startswith(("this", "Onnx")) else "tab:gray" for row in rows]
        bars = axis.barh([row.contender for row in rows], [row.pairs / row.median for row in rows], color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set(title=workload, xlabel="pairs per second")
        axis.margins(x=0.2)
    figure.suptitle(title)
    save_picture(figure, path)


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> list[str]:
    return [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]


if __name__ == "__main__":
    main()
