"""Packs filled up to a few sizes, as CUDA graphs need them, on a CPU: the same scores. The graphs themselves need a GPU."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DATA
from torch import Tensor

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import encoder
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.families import family_of
from bge_rerank_plugins.core.graphs import ATTEMPTS, SEQUENCES, SIZES, Graphs, Run, _Recorder, graphs_for
from bge_rerank_plugins.core.packing import Pack, pack_sequences
from bge_rerank_plugins.core.sequences import TokenSequence
from bge_rerank_plugins.settings import RerankSettings

CPU = torch.device("cpu")
ENCODERS = sorted(path.name for path in DATA.iterdir() if path.name.startswith("encoder"))


@pytest.fixture(params=ENCODERS)
def family(request: pytest.FixtureRequest) -> Iterator[Any]:
    settings = RerankSettings(model=str(DATA / request.param))
    checkpoint = Checkpoint.from_settings(settings)
    with torch.inference_mode():
        yield family_of(checkpoint).load(checkpoint, settings, CPU, torch.float32)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is computed sequence by sequence."""
    monkeypatch.setattr(encoder, "by_sequence", lambda hidden: False)


def again(run: Run, buffer: Tensor) -> Run:
    """Repeats a computation by doing it again."""
    return run


def passages(count: int, words: int) -> list[str]:
    return [" ".join(f"panda {i} bear".split() * (1 + (i * 7) % words)) for i in range(count)]


def plain(family: Any, sequences: list[Any]) -> list[float]:
    scores: list[float] = family.forward(pack_sequences(sequences)).tolist()
    return scores


@pytest.mark.parametrize(("count", "words"), [(1, 1), (3, 2), (20, 10), (60, 9), (SEQUENCES - 30, 2)])
def test_a_pack_that_is_filled_up_has_the_scores_of_the_pack(family: Any, count: int, words: int) -> None:
    graphs = Graphs(family, CPU, again)
    sequences = family.encode("what is a panda?", passages(count, words))
    assert sum(map(len, sequences)) not in SIZES
    for part in (sequences, sequences[::-1]):  # the second time on the same buffer
        scores = graphs.score(part)
        assert scores is not None
        assert scores.tolist() == pytest.approx(plain(family, part), abs=1e-5)


def test_a_pack_of_exactly_a_graphs_size_needs_no_filling(family: Any) -> None:
    for size in (SIZES[0], SIZES[-1]):
        graphs = Graphs(family, CPU, again)
        length = graphs._longest
        lengths = [length] * (size // length) + ([size % length] if size % length else [])
        sequences = [TokenSequence([5] * n) for n in lengths]
        scores = graphs.score(sequences)
        assert scores is not None
        assert scores.tolist() == pytest.approx(plain(family, sequences), abs=1e-4)
        assert max(segment.stop - segment.start for segment in graphs._segments) <= length


def test_a_size_is_recorded_once(family: Any) -> None:
    recorded: list[int] = []

    def record(run: Run, buffer: Tensor) -> Run:
        recorded.append(len(buffer))
        return run

    graphs = Graphs(family, CPU, record)
    for count in (1, 2, 3, 30, 31, 1, 30):
        graphs.score(family.encode("panda", passages(count, 3)))
    assert len(recorded) == len(set(recorded)) <= 3


def test_what_does_not_fit_is_left_to_the_plain_forward_pass(family: Any) -> None:
    graphs = Graphs(family, CPU, again)
    assert graphs.score(family.encode("panda", ["a"] * (SEQUENCES + 1))) is None
    sequences = family.encode("panda", ["panda " * 400] * (1 + SIZES[-1] // 100))
    assert sum(map(len, sequences)) > SIZES[-1]
    assert graphs.score(sequences) is None


def failing(run: Run, buffer: Tensor) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def wrong(run: Run, buffer: Tensor) -> Run:
    return lambda numbers: run(numbers) + 1e3


def broken(run: Run, buffer: Tensor) -> Run:
    return lambda numbers: run(numbers) * torch.nan


@pytest.mark.parametrize("record", [failing, wrong, broken])
def test_graphs_that_fail_are_given_up_with_a_warning(
    record: Any, family: Any, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs(family, CPU, record)
    sequences = family.encode("panda", passages(5, 3))
    assert [graphs.score(sequences) for _ in range(ATTEMPTS + 1)] == [None] * (ATTEMPTS + 1)
    assert len([r for r in caplog.records if "no CUDA graphs" in r.getMessage()]) == 1


def test_a_graph_that_computes_something_else_is_not_tried_again(family: Any) -> None:
    recorded: list[int] = []

    def record(run: Run, buffer: Tensor) -> Run:
        recorded.append(len(buffer))
        return wrong(run, buffer)

    graphs = Graphs(family, CPU, record)
    for count in (1, 5, 30):
        assert graphs.score(family.encode("panda", passages(count, 3))) is None
    assert len(recorded) == 1


def test_a_capture_that_fails_once_leaves_the_graphs(family: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Another thread that waits for the device makes one fail."""
    records = iter([failing, again, failing, again])
    graphs = Graphs(family, CPU, lambda run, buffer: next(records)(run, buffer))
    few, many = (family.encode("panda", passages(count, 3)) for count in (5, 40))
    for sequences in (few, many):
        assert graphs.score(sequences) is None
        for _ in range(2):
            scores = graphs.score(sequences)
            assert scores is not None
            assert scores.tolist() == pytest.approx(plain(family, sequences), abs=1e-5)
    assert not caplog.records


def test_a_score_near_zero_does_not_cost_the_graphs(family: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Rounding that is nothing beside 1 may be many times such a score: packs of one pair gave the graphs up."""
    sequences = family.encode("panda", ["bear"])
    family._head[-1].register_forward_hook(lambda module, args, output: output * 1e-3)

    def rounding(run: Run, buffer: Tensor) -> Run:
        return lambda numbers: run(numbers) + 0.05

    assert Graphs(family, CPU, rounding).score(sequences) is not None
    assert not caplog.records


def test_an_error_of_the_model_is_raised_and_leaves_the_graphs(
    family: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory, above all: the engine then takes smaller packs, and those may have graphs again."""
    graphs = Graphs(family, CPU, again)
    sequences = family.encode("panda", passages(5, 3))

    def full(pack: Pack) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(family, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            graphs.score(sequences)
    scores = graphs.score(sequences)
    assert scores is not None
    assert scores.tolist() == pytest.approx(plain(family, sequences), abs=1e-5)
    assert not caplog.records


def test_a_worker_that_has_graphs_scores_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, small packs and large ones in turns."""
    model = str(DATA / ENCODERS[0])
    texts = passages(200, 12)
    with Scorer(model) as scorer:
        expected = scorer.score("panda", texts), scorer.score("panda", texts[:9])
    made: list[Graphs] = []

    def graphs(family: Any, *_: object) -> Graphs:
        made.append(Graphs(family, CPU, again))
        return made[0]

    monkeypatch.setattr("bge_rerank_plugins.core.worker.graphs_for", graphs)
    with Scorer(model, local_files_only=True) as scorer:
        for _ in range(2):
            assert scorer.score("panda", texts) == pytest.approx(expected[0], abs=1e-5)
            assert scorer.score("panda", texts[:9]) == pytest.approx(expected[1], abs=1e-5)
    assert made[0]._replays


def test_there_are_none_on_a_cpu(family: Any) -> None:
    assert graphs_for(family, {"hidden_size": 64, "num_attention_heads": 4}, CPU, torch.bfloat16) is None


class Cuda:
    """What `torch.cuda` promises of streams and captures, for two devices, without computing aside."""

    def __init__(self) -> None:
        self.capturing: list[str] = []
        self.captured: list[tuple[str, str]] = []
        self._thread = threading.local()

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(device=str(device), default=False, wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(device=str(self._thread.device), default=True, wait_stream=lambda other: None)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self._thread.device = device
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """One at a time in a process, on a stream of the device; other threads may go on using theirs."""
        assert capture_error_mode == "thread_local"
        assert not self.capturing
        assert not stream.default
        self.capturing.append(stream.device)
        time.sleep(0.02)
        yield
        self.captured.append((stream.device, str(self._thread.device)))
        self.capturing.clear()


def test_two_devices_capture_in_turns_and_each_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    recorders = [_Recorder(torch.device("cuda", index)) for index in (0, 1)]
    buffer = torch.zeros(1)
    with ThreadPoolExecutor(2) as threads:
        for recorded in threads.map(lambda record: record(lambda numbers: numbers + 1, buffer), recorders * 4):
            assert recorded(buffer).tolist() == [1]
    assert sorted(cuda.captured) == [("cuda:0", "cuda:0")] * 4 + [("cuda:1", "cuda:1")] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs run on CUDA only")
def test_graphs_on_cuda_have_the_scores_of_the_plain_forward_pass() -> None:
    with Scorer(str(DATA / ENCODERS[0]), device="cuda", dtype="bfloat16") as scorer:
        texts = passages(60, 5)
        worker = scorer._lease.acquired().loaded.result()
        scores = [scorer.score("panda", texts[:count]) for count in (3, 20, 60, 3, 20, 60)]
        for first, second in zip(scores[:3], scores[3:], strict=True):  # passages of one call may share packs otherwise
            assert first == pytest.approx(second, abs=0.05 * max(map(abs, first)))
        with torch.inference_mode():
            expected = worker.forward(pack_sequences(worker.encode("panda", texts), "cuda")).tolist()
        assert scores[2] == pytest.approx(expected, abs=0.05 * max(map(abs, expected)))
