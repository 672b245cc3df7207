"""A device that computes while its thread goes on, as CUDA does, played by the CPU: the next pack is sent before the last one is
read, and everything that holds without that holds with it."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import DATA

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core.worker import Pending, Worker

ENCODER, DECODER = str(DATA / "encoder"), str(DATA / "decoder")
QUERY = "what is a panda?"
PASSAGES = [f"panda number {i} in Sichuan " * (1 + i % 5) for i in range(60)]


@pytest.fixture(params=[ENCODER, DECODER])
def expected(request: pytest.FixtureRequest) -> tuple[str, list[float]]:
    with Scorer(request.param) as scorer:
        return request.param, scorer.score(QUERY, PASSAGES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What workers are asked, in order."""
    calls: list[str] = []
    start, finish = Worker.start, Worker.finish

    def counted_start(self: Worker, *arguments: Any, **options: Any) -> Pending:
        calls.append("start")
        return start(self, *arguments, **options)

    def counted_finish(self: Worker, pending: Pending) -> list[Any]:
        calls.append("finish")
        return finish(self, pending)

    monkeypatch.setattr(Worker, "start", counted_start)
    monkeypatch.setattr(Worker, "finish", counted_finish)
    return calls


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes workers send one pack ahead."""
    init = Worker.__init__

    def ahead(self: Worker, *arguments: Any) -> None:
        init(self, *arguments)
        self.packs_ahead = 1

    monkeypatch.setattr(Worker, "__init__", ahead)


def small(model: str) -> Scorer:
    """A scorer of many packs, on an engine of its own."""
    scorer = Scorer(model, max_batch_tokens=300, local_files_only=True)
    scorer.warmup()
    return scorer


@pytest.mark.usefixtures("aside")
def test_the_next_pack_is_sent_before_the_last_is_read(expected: tuple[str, list[float]], calls: list[str]) -> None:
    model, scores = expected
    with small(model) as scorer:
        calls.clear()
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(scores, abs=1e-5)
        assert scorer.stats()["queued_tokens"] == 0
    packs = calls.count("start")
    assert packs > 5
    assert calls == ["start", *["start", "finish"] * (packs - 1), "finish"]


class Later:
    """When a device has copied its scores, as `torch.cuda.Event` tells it: when told to."""

    def __init__(self) -> None:
        self._happened = threading.Event()
        self.set = self._happened.set
        self.query = self._happened.is_set

    def synchronize(self) -> None:
        assert self._happened.wait(30)


@pytest.mark.usefixtures("aside")
def test_what_comes_while_a_pack_is_computed_is_sent_behind_it(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread waited for the pack, and the device for the thread, while the next passages were there."""
    start, copied = Worker.start, [Later(), Later()]
    waiting = iter(copied)

    def slow(self: Worker, *arguments: Any, **options: Any) -> Pending:
        return Pending(start(self, *arguments, **options).scores, next(waiting))

    with small(ENCODER) as scorer, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(Worker, "start", slow)
        calls.clear()
        scored = []
        for number in (1, 2):
            scored.append(pool.submit(scorer.score, QUERY, PASSAGES[:number]))
            until = time.monotonic() + 5
            while calls.count("start") < number and time.monotonic() < until:
                time.sleep(0.001)
        sent = calls[:2]
        for event in copied:
            event.set()
        assert sent == ["start", "start"]
        assert [len(future.result(timeout=30)) for future in scored] == [1, 2]


@pytest.mark.usefixtures("aside")
def test_a_device_that_fails_while_its_pack_is_awaited_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        synchronize = query

    start = Worker.start
    with small(ENCODER) as scorer:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "start", lambda self, *a, **k: Pending(start(self, *a, **k).scores, Broken()))
            with pytest.raises(RuntimeError, match="scoring failed: CUDA error"):
                scorer.score(QUERY, PASSAGES[:1])
        assert len(scorer.score(QUERY, PASSAGES[:1])) == 1


@pytest.mark.usefixtures("aside")
def test_the_time_of_packs_that_overlap_is_counted_once_and_idle_time_not_at_all() -> None:
    with small(ENCODER) as scorer:
        before = scorer.stats()["device_seconds"]
        time.sleep(0.2)
        start = time.perf_counter()
        scorer.score(QUERY, PASSAGES)
        taken = time.perf_counter() - start
        assert 0 < scorer.stats()["device_seconds"] - before < taken


@pytest.mark.usefixtures("aside")
def test_a_pack_that_nothing_follows_is_not_held_back(expected: tuple[str, list[float]], calls: list[str]) -> None:
    model, scores = expected
    with small(model) as scorer:
        assert scorer.score(QUERY, PASSAGES[:1]) == pytest.approx(scores[:1], abs=1e-5)
        assert calls[-1] == "finish"


def test_on_a_cpu_every_pack_is_read_before_the_next_is_sent(calls: list[str]) -> None:
    with small(ENCODER) as scorer:
        calls.clear()
        scorer.score(QUERY, PASSAGES)
    packs = calls.count("start")
    assert packs > 5
    assert calls == ["start", "finish"] * packs


@pytest.mark.usefixtures("aside")
def test_many_callers_get_their_own_scores(expected: tuple[str, list[float]]) -> None:
    model, scores = expected
    with small(model) as scorer, ThreadPoolExecutor(8) as pool:

        def ask(first: int) -> list[float]:
            return scorer.score(QUERY, PASSAGES[first::7])

        for first, got in zip([*range(7)] * 5, pool.map(ask, [*range(7)] * 5), strict=True):
            assert got == pytest.approx(scores[first::7], abs=1e-5)

        async def cancelled() -> list[float]:
            call = asyncio.ensure_future(scorer.ascore(QUERY, PASSAGES))
            await asyncio.sleep(0.01)
            call.cancel()
            return await scorer.ascore(QUERY, PASSAGES[:5])

        assert asyncio.run(cancelled()) == pytest.approx(scores[:5], abs=1e-5)


@pytest.mark.parametrize("where", ["start", "finish"])
@pytest.mark.usefixtures("aside")
def test_a_pack_that_fails_fails_its_requests_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = getattr(Worker, where)
    failures = iter([False, True])

    def fails_once(self: Worker, *arguments: Any, **options: Any) -> Any:
        if next(failures, False):
            raise KeyError("a bug")
        return sound(self, *arguments, **options)

    with small(ENCODER) as scorer:
        monkeypatch.setattr(Worker, where, fails_once)
        with pytest.raises(RuntimeError, match="scoring failed: 'a bug'"):
            scorer.score(QUERY, PASSAGES)
        assert len(scorer.score(QUERY, PASSAGES)) == len(PASSAGES)


@pytest.mark.usefixtures("aside")
def test_what_does_not_fit_beside_another_pack_is_tried_alone(
    expected: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scores = expected
    start, count, flying = Worker.start, iter(range(1000)), 0
    finish = Worker.finish

    def too_much(self: Worker, sequences: Any, *arguments: Any, **options: Any) -> Pending:
        nonlocal flying
        number = next(count)
        if number == 2 or (len(sequences) == 1 and flying):
            raise torch.OutOfMemoryError("injected")
        flying += 1
        return start(self, sequences, *arguments, **options)

    def landed(self: Worker, pending: Pending) -> list[Any]:
        nonlocal flying
        flying -= 1
        return finish(self, pending)

    with small(model) as scorer:
        monkeypatch.setattr(Worker, "start", too_much)
        monkeypatch.setattr(Worker, "finish", landed)
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(scores, abs=1e-5)
        assert scorer.stats()["out_of_memory"] > 1


@pytest.mark.parametrize("where", ["start", "finish"])
@pytest.mark.usefixtures("aside")
def test_a_worker_that_dies_leaves_nobody_waiting(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those whose pack was sent and not read, nor those behind them."""
    sound, count = getattr(Worker, where), iter(range(1000))

    def dies(self: Worker, *arguments: Any, **options: Any) -> Any:
        if next(count) == 2:
            raise SystemExit("the worker is gone")
        return sound(self, *arguments, **options)

    scorer = small(ENCODER)
    monkeypatch.setattr(Worker, where, dies)
    outcomes: list[str] = []

    def ask() -> None:
        try:
            scorer.score(QUERY, PASSAGES)
            outcomes.append("scored")
        except RuntimeError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    monkeypatch.setattr(Worker, where, sound)
    assert len(outcomes) == 6
    assert any("the worker is gone" in outcome for outcome in outcomes)
    assert len(scorer.score(QUERY, PASSAGES)) == len(PASSAGES)
    scorer.close()


@pytest.mark.usefixtures("aside")
def test_closing_tells_those_who_wait_and_ends_the_thread() -> None:
    scorer = small(ENCODER)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(scorer.score, QUERY, PASSAGES * 20) for _ in range(4)]
        scorer.close()
        for call in calls:
            with pytest.raises(RuntimeError):
                call.result(timeout=30)
