"""All families on a device that is not the CPU, as far as that can be had without one. See `own_device`."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import correlation
from typing import Any

import pytest
from conftest import DATA

from bge_rerank_plugins import RerankSettings, Scorer

QUERY = "what is a panda?"
PASSAGES = [f"panda number {i} in Sichuan " * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that may have the device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def with_kernel(name: str) -> None:
    """Has attention be what it is on a GPU with the kernel, or on every other device."""
    import own_device
    import torch.nn.attention.varlen

    from bge_rerank_plugins.core import attention

    torch.nn.attention.varlen.varlen_attn = own_device.varlen_attn
    attention.attention_for = lambda *_: getattr(attention, f"_attend_{name}")


def scored_there(model: str, kernel: str, **options: Any) -> tuple[list[float], dict[str, int], int]:
    """In the other process: scores of `PASSAGES`, what passed between host and device for them, and how many packs they were."""
    from own_device import traffic

    with_kernel(kernel)
    with Scorer(model, device="npu", **options) as scorer:
        scorer.warmup()
        traffic.clear()
        before = scorer.stats()["packs"]
        scores = scorer.score(QUERY, PASSAGES)
        return scores, dict(traffic), scorer.stats()["packs"] - before


@pytest.fixture(
    params=[
        "encoder",
        "decoder",
        "layerwise",
        "roberta",
        "bert",
        "Gemma",
        "Gemma2",
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
    ]
)
def model(request: pytest.FixtureRequest, classifier_dirs: dict[str, str], causal_dirs: dict[str, str]) -> str:
    name: str = request.param
    return {**classifier_dirs, **causal_dirs}.get(name, str(DATA / name))


@pytest.fixture
def expected(model: str) -> list[float]:
    with Scorer(model, device="cpu") as scorer:
        return scorer.score(QUERY, PASSAGES)


@pytest.mark.parametrize("kernel", ["varlen", "padded"])
def test_scores_are_those_of_the_cpu_with_one_copy_there_and_one_back(
    model: str, kernel: str, expected: list[float], process: ProcessPoolExecutor
) -> None:
    scores, traffic, packs = process.submit(scored_there, model, kernel, max_batch_tokens=500).result()
    assert scores == pytest.approx(expected, abs=1e-4)
    assert packs > 5
    assert traffic == {"sent": packs, "read": packs}


def test_half_precision_goes_the_same_way(model: str, expected: list[float], process: ProcessPoolExecutor) -> None:
    scores, traffic, packs = process.submit(scored_there, model, "varlen", dtype="bfloat16").result()
    assert correlation(scores, expected) > 0.9  # weights are wide, and rounded states go far
    assert traffic == {"sent": packs, "read": packs}


def replayed_there(
    model: str, first: list[list[str]], then: list[list[str]]
) -> tuple[list[list[float]], dict[str, int]]:
    """In the other process: scores of packs through recordings of others of the same sizes, and what passed for them."""
    from own_device import Recording, traffic

    from bge_rerank_plugins.core.graphs import Graphs, Run
    from bge_rerank_plugins.core.worker import Worker

    def record(run: Run, buffer: Any) -> Run:
        recording = Recording(lambda: run(buffer))
        return lambda _: recording.replay()

    with_kernel("varlen")
    worker = Worker(RerankSettings(model=model), "npu")
    worker._graphs = Graphs(worker.family, worker.device, record)

    def scores(passages: list[str]) -> list[float]:
        return worker.finish(worker.start(worker.family.encode(QUERY, passages)))

    for passages in first:
        scores(passages)
    traffic.clear()
    return [scores(passages) for passages in then], dict(traffic)


def test_a_recorded_pack_reads_nothing_but_its_buffer(process: ProcessPoolExecutor) -> None:
    """Graphs on a GPU do the same operations again on the same memory; a number that Python put in would stay what it was."""
    first = [
        [f"panda {i} " * (1 + (i * step) % 7) for i in range(count)] for step, count in ((2, 10), (3, 24), (5, 40))
    ]
    then = [[*passages[5:], " ".join(passages[:5])] for passages in first]  # the longest are longer than before
    path = str(DATA / "encoder")
    with Scorer(path, device="cpu") as scorer:
        expected = [scorer.score(QUERY, passages) for passages in then]
    scores, traffic = process.submit(replayed_there, path, first, then).result()
    assert scores == [pytest.approx(of, abs=1e-4) for of in expected]
    assert traffic == {"sent": 3, "replayed": 3, "read": 3}
