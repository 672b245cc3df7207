"""What a service feels: many requests at once against one after another, and the event loop meanwhile.

    python examples/benchmark_load.py                # the embedded model
    python examples/benchmark_load.py --model BAAI/bge-reranker-v2-m3 --device cuda --dtype fast    # once downloaded
    python examples/benchmark_load.py --scaling      # time per token of 10 to 10,000 passages
    python examples/benchmark_load.py --stream 1000000 --model tests/data/encoder    # memory of a long stream

Requests come from real text, docstrings of the standard library. Both ways run in turns; the table shows medians.
"""

import argparse
import asyncio
import gc
import os
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.docstrings import standard_library
from bge_rerank_plugins.settings import Dtype

Request = tuple[str, list[str]]


def main() -> None:
    """Runs both ways for two kinds of requests and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=1000, help="requests of two short passages")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stream", type=int, help="measure the memory of a stream of so many pairs instead")
    parser.add_argument(
        "--scaling", action="store_true", help="measure how time grows with the number of passages instead"
    )
    options = parser.parse_args()
    if options.stream or options.scaling:
        with Scorer(options.model, device=options.device, dtype=options.dtype) as scorer:
            _measure_stream(scorer, options.stream) if options.stream else _measure_scaling(scorer)
        return
    show_load(options.model, options.device, options.dtype, options.requests, options.runs)


def show_load(model: str, device: str | None, dtype: Dtype, count: int, runs: int) -> None:
    """Measures `count` requests of two short passages, and a twentieth of that of 20 passages, and prints a table."""
    texts = [docstring.text for docstring in standard_library()]
    kinds = {
        "2 short passages": _requests(texts, count, passages=2, characters=60),
        "20 passages": _requests(texts, max(1, count // 20), passages=20, characters=300),
    }
    with Scorer(model, device=device, dtype=dtype) as scorer:
        scorer.warmup()
        gc.collect()
        gc.freeze()  # else Python's collector goes through all of torch's objects now and then, 0.2 s each time
        table = Table(title=f"{model}, {dtype}, medians of {runs} runs", title_justify="left")
        for title in ("requests", "one by one", "at once", "faster", "longest stall of the loop"):
            table.add_column(title, justify="left" if title == "requests" else "right")
        for name, requests in kinds.items():
            measured = [asyncio.run(_both_ways(scorer, requests)) for _ in range(runs)]
            alone, together, stall = (statistics.median(column) for column in zip(*measured, strict=True))
            table.add_row(
                f"{len(requests)} of {name}",
                f"{alone:.2f} s",
                f"{together:.2f} s",
                f"{alone / together:.2f} x",
                f"{1000 * stall:.0f} ms",
            )
    gc.unfreeze()
    Console().print(table)


def _requests(texts: list[str], count: int, passages: int, characters: int) -> list[Request]:
    def text(number: int) -> str:
        return texts[number * 7919 % len(texts)][:characters]

    return [(text(i)[:60], [text(i * passages + j + 1) for j in range(passages)]) for i in range(count)]


async def _both_ways(scorer: Scorer, requests: list[Request]) -> tuple[float, float, float]:
    """Seconds one after another, seconds all at once, and the loop's longest stall while all run at once."""
    start = time.perf_counter()
    for query, passages in requests:
        await scorer.ascore(query, passages)
    alone = time.perf_counter() - start
    watch = asyncio.create_task(_longest_stall())
    await asyncio.sleep(0)
    start = time.perf_counter()
    await asyncio.gather(*(scorer.ascore(query, passages) for query, passages in requests))
    together = time.perf_counter() - start
    watch.cancel()
    return alone, together, await watch


async def _longest_stall() -> float:
    """How much later than asked for the loop ever woke this task, until it is cancelled."""
    longest = 0.0
    try:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - asked - 0.001)
    except asyncio.CancelledError:
        return longest


def _measure_stream(scorer: Scorer, count: int) -> None:
    """Prints how far the process's memory ever rose during a short stream, and during a long one after it."""
    texts = [docstring.text[:40] for docstring in standard_library()]
    for pairs in (10_000, count):
        start = time.perf_counter()
        stream = ((texts[i // 20 % len(texts)], texts[i * 7919 % len(texts)]) for i in range(pairs))
        scored = sum(1 for _ in scorer.score_stream(stream))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{scored} pairs in {seconds:.0f} s; peak memory {peak:.0f} MiB", flush=True)


def _measure_scaling(scorer: Scorer) -> None:
    """Prints the time per token of a request, the more passages the longer; the best of three, after one to warm up."""
    texts = [docstring.text[:300] for docstring in standard_library()]
    for count in (10, 100, 1000, 10_000):
        passages = [texts[i * 7919 % len(texts)] for i in range(count)]
        seconds = []
        for _ in range(4 if count < 10_000 else 1):
            before, start = scorer.stats()["tokens"], time.perf_counter()
            scorer.score("read a file line by line", passages)
            seconds.append(time.perf_counter() - start)
            tokens = scorer.stats()["tokens"] - before
        print(f"{count:6} passages, {tokens:8.0f} tokens: {1e6 * min(seconds) / tokens:6.1f} us per token", flush=True)


if __name__ == "__main__":
    main()
