"""The engine under faults: a fault stays with the request it belongs to, and the next request succeeds."""

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import DATA
from torch import Tensor

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.core import engine as engine_module
from bge_rerank_plugins.core import layerwise, worker
from bge_rerank_plugins.core.device import available_devices, choose_device, choose_precision, release_cached_memory
from bge_rerank_plugins.core.engine import EngineClosedError
from bge_rerank_plugins.core.outcome import give, recorded
from bge_rerank_plugins.core.packing import Pack
from bge_rerank_plugins.core.prefixes import Prefixes
from bge_rerank_plugins.core.room import Room
from bge_rerank_plugins.core.schedule import Job, Pair, Request, Schedule
from bge_rerank_plugins.core.sequences import TokenSequence
from bge_rerank_plugins.core.stats import EngineStats
from bge_rerank_plugins.core.worker import (
    SMALLEST_BUDGET,
    Pending,
    Worker,
    budget_within,
    token_bytes,
)
from bge_rerank_plugins.signals import asking

MODEL = str(DATA / "encoder")


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    with Scorer(MODEL, max_batch_tokens=256) as scorer:
        scorer.warmup()
        yield scorer


def inject(scorer: Scorer, fault: Callable[[Pack, Callable[[Pack], Tensor]], Tensor]) -> None:
    """Puts `fault` in the way of the loaded model's forward pass."""
    family: Any = scorer._lease.acquired().loaded.result()
    forward = family.forward
    family.forward = lambda pack, cutoff_layers=(): fault(pack, forward)


def heal(scorer: Scorer) -> None:
    del scorer._lease.acquired().loaded.result().forward  # type: ignore[misc]


def test_an_error_of_the_model_reaches_the_caller_with_its_cause(scorer: Scorer) -> None:
    def broken(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        raise KeyError("a bug in the model")

    inject(scorer, broken)
    with pytest.raises(RuntimeError, match="scoring failed: 'a bug in the model'") as caught:
        scorer.score("a", ["b"])
    assert isinstance(caught.value.__cause__, KeyError)
    heal(scorer)
    assert len(scorer.score("a", ["b"])) == 1


def test_a_call_that_is_cancelled_while_its_pairs_are_taken_leaves_the_worker(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker had seen that something waited, found nothing to take, and took that for the end."""
    take, cancelled = Schedule.take, []

    def take_too_late(self: Schedule, *arguments: Any) -> list[Pair]:
        if self._waiting and not cancelled:
            cancelled.extend(request.future.cancel() for request in self._waiting)
        return take(self, *arguments)

    monkeypatch.setattr(Schedule, "take", take_too_late)
    engine, family = scorer._lease.loaded()
    request = engine.submit(family.encode("a", ["b"]), engine.open_job(1)).future
    with pytest.raises(CancelledError):
        request.result(timeout=30)
    assert cancelled == [True]
    assert len(scorer.score("a", ["b"])) == 1


@pytest.mark.parametrize("end", ["cancelled", "scored", "closed", "died"])
def test_who_waits_for_room_is_told_however_the_queue_empties(end: str) -> None:
    gate, entered = threading.Event(), threading.Event()

    def gated(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        entered.set()
        gate.wait(30)
        if end == "died":
            raise SystemExit("the worker is gone")
        return forward(pack)

    with Scorer(MODEL, max_queued_tokens=50) as bounded:
        bounded.warmup()
        inject(bounded, gated)
        engine, family = bounded._lease.loaded()
        first = engine.submit(family.encode("a", ["b"]), engine.open_job(1))
        assert entered.wait(30)
        second = engine.submit(family.encode("a", ["panda " * 50]), engine.open_job(1))
        third = engine.submit(family.encode("a", ["panda " * 50]), engine.open_job(1))
        assert second.entered.done()
        assert not third.entered.done()
        if end == "cancelled":
            second.future.cancel()
        closing = threading.Thread(target=engine.close)
        if end == "closed":
            closing.start()
            third.entered.result(timeout=30)
        gate.set()
        third.entered.result(timeout=30)
        if end in ("closed", "died"):
            with pytest.raises(RuntimeError):
                third.future.result(timeout=30)
        else:
            assert first.future.result(timeout=30)
            assert third.future.result(timeout=30)
        if end == "closed":
            closing.join()


def test_who_does_not_come_back_when_there_is_room_keeps_it_from_nobody() -> None:
    """Room was granted to callers, and one whose event loop was blocked, or gone, kept it: others waited for ever."""
    gate, entered = threading.Event(), threading.Event()

    def gated(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        entered.set()
        gate.wait(30)
        return forward(pack)

    with Scorer(MODEL, max_queued_tokens=50, max_batch_tokens=60) as bounded:
        bounded.warmup()
        inject(bounded, gated)

        async def ask() -> list[float]:
            calls = [asyncio.ensure_future(bounded.ascore("a", ["panda " * 50])) for _ in range(4)]
            while bounded.stats()["requests"] < 5:  # the warm-up was one
                await asyncio.sleep(0.001)
            assert await asyncio.to_thread(entered.wait, 30)
            gate.set()
            scores = bounded.score("b", ["panda " * 50])  # on the thread of the loop, which those who wait need
            return scores + [score for call in calls for score in await call]

        assert len(asyncio.run(ask())) == 5
        assert bounded.stats()["queued_tokens"] == 0


def test_a_pack_that_does_not_fit_while_the_scorer_is_closed_leaves_nobody_waiting() -> None:
    """Its pairs were put back into a queue that nobody looked at any more."""
    entered, gate = threading.Event(), threading.Event()

    def full(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        entered.set()
        gate.wait(30)
        raise torch.OutOfMemoryError("injected")

    scorer = Scorer(MODEL, max_batch_tokens=776)
    scorer.warmup()
    inject(scorer, full)
    engine, family = scorer._lease.loaded()
    request = engine.submit(family.encode("a", ["b", "c"]), engine.open_job(2)).future
    assert entered.wait(30)
    closing = threading.Thread(target=scorer.close)
    closing.start()
    while engine.usable:
        time.sleep(0.001)
    gate.set()
    with pytest.raises(EngineClosedError):
        request.result(timeout=30)
    closing.join()


def test_closing_while_several_devices_load_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to load forgot its model again, and what all waited for was then never complete."""
    first, gate, init = threading.Event(), threading.Event(), Worker.__init__

    def one_by_one(self: Worker, *arguments: Any) -> None:
        if first.is_set():
            gate.wait(30)
        first.set()
        init(self, *arguments)

    monkeypatch.setattr(Worker, "__init__", one_by_one)
    scorer = Scorer(MODEL, device=["cpu", "cpu"])
    errors: list[BaseException | None] = []
    engine = scorer._lease.acquired()
    waiting = threading.Thread(target=lambda: errors.append(engine.loaded.exception(timeout=30)))
    waiting.start()
    while not any(engine._families):
        time.sleep(0.001)
    engine.close(wait=False)
    waiting.join(timeout=30)
    gate.set()
    assert [type(error) for error in errors] == [EngineClosedError]
    scorer.close()


@pytest.mark.parametrize("of", ["waits", "enters", "is scored", "loads"])
def test_an_engine_goes_on_while_somebody_holds_the_lock_of_a_future(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio holds one for a moment; a signal's handler that closed just then waited for ever for a worker that wanted it."""
    held, gate, init = threading.Event(), threading.Event(), Worker.__init__

    def at_the_gate(do: Callable[[], Any]) -> Any:
        held.set()
        assert gate.wait(30)
        return do()

    if of == "loads":
        monkeypatch.setattr(Worker, "__init__", lambda *arguments: at_the_gate(lambda: init(*arguments)))
    other_thread = ThreadPoolExecutor(1)
    with Scorer(MODEL, max_batch_tokens=256, max_queued_tokens=50) as scorer:
        engine = scorer._lease.acquired()

        def stats() -> EngineStats:
            """By another thread, which is held up where a worker keeps the engine's lock while it waits for a future's."""
            return other_thread.submit(engine.stats).result(timeout=30)

        if of == "loads":
            future, has_come = engine.loaded, lambda: not engine.loads
        else:
            _, family = scorer._lease.loaded()
            inject(scorer, lambda pack, forward: at_the_gate(lambda: forward(pack)))
            long = family.encode("a", ["panda " * 40])
            first = engine.submit(long, engine.open_job(1))
            assert held.wait(30)
            second, third = (engine.submit(long, engine.open_job(1)) for _ in range(2))
            future, has_come = {
                "waits": (second.future, lambda: stats().queued_tokens),
                "enters": (third.entered, lambda: not engine._room._outside),
                "is scored": (first.future, lambda: stats().pairs),
            }[of]
        with future._condition:
            gate.set()
            while not has_come():
                time.sleep(0.001)
            assert stats()
        assert future.exception(timeout=30) is None
    other_thread.shutdown()


def test_a_request_that_two_threads_end_at_once_is_ended_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether it is finished and the telling, another device's thread told it: that killed the engine."""
    monkeypatch.setattr(Request, "finished", property(lambda _: False, lambda *_: None))
    request = Request([TokenSequence([1])], Job(1))
    give(request, ValueError("first"))
    give(request, ValueError("second"))
    give(request, recorded(Pair(request, 0), 1.0, torch.float32))
    assert str(request.future.exception()) == "first"


def test_layers_that_could_not_be_loaded_are_loaded_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them stood there, and every later call failed."""
    fails, work = iter([True]), layerwise.work_in_place

    def full(model: Any) -> None:
        if next(fails, False):
            raise torch.OutOfMemoryError("injected")
        work(model)

    with Scorer(str(DATA / "layerwise"), cutoff_layer=4) as scorer:
        low = scorer.score("a", ["b"])
        monkeypatch.setattr(layerwise, "work_in_place", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            scorer.score_layers("a", ["b"], [9])
        assert scorer.score("a", ["b"]) == pytest.approx(low)
        assert len(scorer.score_layers("a", ["b"], [4, 9])) == 2


@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_weights_are_gone_when_the_devices_memory_is_given_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker still held them, so that nothing was given back."""
    loaded = Scorer(str(DATA / family), max_batch_tokens=777)
    loaded.warmup()
    weights = weakref.ref(next(loaded._lease.loaded()[1]._backbone.parameters()))  # type: ignore[attr-defined]
    seen: list[object] = []
    monkeypatch.setattr(engine_module, "release_cached_memory", lambda: seen.append(weights()))
    loaded.close()
    assert seen[-1] is None  # other engines of the process may have ended meanwhile


@pytest.mark.parametrize(("kind", "there"), [("mps", True), ("mps", False), ("cuda", False)])
def test_memory_is_given_back_by_the_devices_own_module(
    kind: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch has for all devices raises on Apple's GPUs before 2.13. CUDA is not asked for, which could begin its use."""
    released: list[str] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    for module in (torch.mps, torch.cuda):
        monkeypatch.setattr(module, "empty_cache", lambda name=module.__name__: released.append(name))
    release_cached_memory()
    assert released == ([f"torch.{kind}"] if there or kind == "cuda" else [])


def test_whoever_waits_is_told_when_the_thread_fails_at_making_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs at hand were in no queue and in no pack."""

    def full(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    def broken() -> None:
        raise SystemError("the allocator is broken")

    with Scorer(MODEL, max_batch_tokens=256) as scorer:
        scorer.warmup()
        inject(scorer, full)
        engine, family = scorer._lease.loaded()
        monkeypatch.setattr(worker, "release_cached_memory", broken)
        request = engine.submit(family.encode("a", ["b", "c"]), engine.open_job(2)).future
        with pytest.raises(RuntimeError, match="scoring failed: the allocator is broken"):
            request.result(timeout=30)


@pytest.mark.parametrize("bound", [None, 50])
@pytest.mark.parametrize("before", ["enter", "_add"])
def test_a_request_that_enters_while_its_threads_signal_handler_closes_is_told(
    before: str, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went into a queue that had been emptied for the last time."""
    scorer = Scorer(MODEL, max_batch_tokens=781, max_queued_tokens=bound)
    scorer.warmup()
    whole = getattr(Room, before)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        scorer.close()
        return whole(*arguments, **options)

    begun, goes_on = threading.Event(), threading.Event()

    def busy(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        begun.set()
        assert goes_on.wait(timeout=30)
        return forward(pack)

    inject(scorer, busy)
    engine, family = scorer._lease.loaded()
    engine.submit(family.encode("a", ["b"]), engine.open_job(1))
    assert begun.wait(timeout=30)
    monkeypatch.setattr(Room, before, interrupted)
    with asking():  # a close within a call does not wait for the worker, which cannot end before the call does
        request = engine.submit(family.encode("a", ["b"]), engine.open_job(1))
    with pytest.raises(EngineClosedError):
        request.future.result(timeout=30)
    goes_on.set()
    assert request.entered.done()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_a_number_fails_its_own_request_and_names_the_cure(scorer: Scorer, value: float) -> None:
    long = "panda " * 60

    def poisoned(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        scores = forward(pack)
        scores[pack.last_rows - pack.first_rows > 60] = value
        return scores

    inject(scorer, poisoned)
    results: dict[str, object] = {}

    def ask(name: str, passages: list[str]) -> None:
        try:
            results[name] = scorer.score("a", passages)
        except ValueError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=ask, args=("poisoned", ["short", long])) for _ in range(1)]
    threads += [threading.Thread(target=ask, args=(f"sound {i}", ["short"])) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert f"pair 1: the model's score is {value}" in str(results.pop("poisoned"))
    assert len(results) == 5
    assert all(isinstance(scores, list) for scores in results.values())


def test_float16_that_overflows_names_the_precision_to_use_instead() -> None:
    with Scorer(MODEL, dtype="float16") as half:
        half.warmup()
        inject(half, lambda pack, forward: forward(pack) * torch.nan)
        with pytest.raises(ValueError, match=r"in float16: use dtype='bfloat16' or 'float32'"):
            half.score("a", ["b"])


def by_class() -> None:
    raise torch.OutOfMemoryError("injected")


def by_message() -> None:
    raise RuntimeError(
        "MPS backend out of memory (MPS allocated: 8.81 GB, other allocations: 8.38 MB, max allowed: 9.07 GB)"
    )


def by_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "run_out", [by_class, by_message, by_cublas, lambda: torch.empty(2**50), lambda: bytearray(2**60)]
)
def test_out_of_memory_halves_the_pack_and_loses_nothing(scorer: Scorer, run_out: Callable[[], object]) -> None:
    """However torch says it: only CUDA's has a class of its own, and on others the request failed."""
    passages = [f"panda number {i} in Sichuan" for i in range(40)]
    expected = scorer.score("panda", passages)
    sizes: list[int] = []

    def small(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        sizes.append(len(pack))
        if len(pack) > 100:
            run_out()
        return forward(pack)

    inject(scorer, small)
    assert scorer.score("panda", passages) == pytest.approx(expected, abs=1e-5)
    assert 0 < sum(size > 100 for size in sizes) <= 2  # remembered, not found out again with every pack
    heal(scorer)
    assert scorer.score("panda", passages) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["decoder", "layerwise"])
def test_a_query_of_an_llm_reranker_is_computed_once_for_all_packs_of_its_request(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "pays", lambda dtype: False)  # else its packs are filled up, on some processors
    query, passages = "what is a panda " * 10, [f"panda number {i} in Sichuan" for i in range(30)]
    with Scorer(str(DATA / name)) as whole, Scorer(str(DATA / name), max_batch_tokens=400) as parts:
        expected = whole.score(query, passages)
        sequences = whole._lease.loaded()[1].encode(query, passages)
        sizes: list[int] = []
        parts.warmup()

        def counted(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
            sizes.append(len(pack))
            if len(sizes) == 3:
                raise torch.OutOfMemoryError("injected")
            return forward(pack)

        inject(parts, counted)
        assert parts.score(query, passages) == pytest.approx(expected, abs=1e-5)
        assert len(sizes) > 4
        once = sequences[0].prefix + sum(len(sequence) - sequence.prefix for sequence in sequences)
        assert parts.stats()["mean_fill"] <= 1
        # What did not fit was computed in vain, and the prefix again after it.
        assert sum(sizes) == once + sizes[2] + sequences[0].prefix


def test_a_budget_is_what_half_of_the_free_memory_holds() -> None:
    per_token = token_bytes({"hidden_size": 1024, "intermediate_size": 4096}, torch.bfloat16)
    assert per_token == 2 * (12 * 1024 + 4 * 4096)
    assert budget_within(16384, None, per_token) == 16384
    assert budget_within(16384, 80 * 2**30, per_token) == 16384
    assert budget_within(16384, 2**29, per_token) == 2**28 // per_token < 16384
    assert budget_within(16384, 0, per_token) == SMALLEST_BUDGET
    assert token_bytes({"hidden_size": 10}, torch.float32) == 4 * (120 + 160)


def test_a_budget_is_that_of_the_settings_or_else_what_the_devices_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_token = token_bytes(json.loads((DATA / "encoder" / "config.json").read_text()), torch.float32)
    monkeypatch.setattr(worker, "free_memory", lambda device: 2 * 600 * per_token)
    assert Worker(RerankSettings(model=MODEL), "cpu").budget == 600
    assert Worker(RerankSettings(model=MODEL, max_batch_tokens=9000), "cpu").budget == 9000


def test_a_budget_that_was_halved_grows_again_slowly_up_to_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not fit beside a neighbour on the device fits when that one is gone."""
    monkeypatch.setattr(worker, "PACKS_BEFORE_GROWTH", 3)
    one = Worker(RerankSettings(model=MODEL, max_batch_tokens=500), "cpu")
    pair = one.family.encode("a", ["b"])

    def budgets_after(packs: int) -> list[int]:
        budgets = []
        for _ in range(packs):
            one.finish(one.start(pair))
            budgets.append(one.budget)
        return budgets

    one.shrink(800)
    assert budgets_after(2) == [250, 250]
    one.shrink(200)  # and the packs that fitted count no more
    assert budgets_after(4) == [100, 100, 112, 112]
    budgets = budgets_after(45)[1::3]
    assert all(before < after <= before * 9 / 8 for before, after in pairwise(budgets) if before < 500)
    assert budgets[-2:] == [500, 500]
    one.shrink(2)
    assert budgets_after(3) == [1, 1, 2]


def test_the_prefix_of_a_call_that_was_cancelled_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next call, which may never come, its keys and values would fill the device's memory."""
    finish, kept = Worker.finish, list[weakref.ref[Prefixes]]()

    def cancelled(self: Worker, pending: Pending) -> list[Any]:
        assert list(self.kept), "nothing is kept for the next pack"
        kept.append(weakref.ref(self.kept))
        request.cancel()
        return finish(self, pending)

    with Scorer(str(DATA / "decoder"), max_batch_tokens=400) as scorer:
        scorer.warmup()
        engine, family = scorer._lease.loaded()
        monkeypatch.setattr(Worker, "finish", cancelled)
        sequences = family.encode("what is a panda " * 10, [f"panda number {i} in Sichuan" for i in range(60)])
        request = engine.submit(sequences, engine.open_job(60)).future
        until = time.monotonic() + 5
        while not (kept and kept[0]() is None) and time.monotonic() < until:
            time.sleep(0.001)
        assert len(kept) == 1
        assert kept[0]() is None


def test_a_pair_that_does_not_fit_alone_is_an_error_for_its_request_only(scorer: Scorer) -> None:
    def tiny(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        if len(pack) > 100:
            raise torch.OutOfMemoryError("injected")
        return forward(pack)

    inject(scorer, tiny)
    with pytest.raises(RuntimeError, match=r"out of memory on cpu: one pair of .* lower max_length") as caught:
        scorer.score("panda", ["panda " * 200])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert len(scorer.score("panda", ["bear"])) == 1


def test_a_worker_that_dies_fails_whoever_waits_and_the_next_call_starts_a_new_one(scorer: Scorer) -> None:
    def deadly(pack: Pack, forward: Callable[[Pack], Tensor]) -> Tensor:
        raise SystemExit("the worker is gone")

    inject(scorer, deadly)
    with pytest.raises(RuntimeError, match="the worker is gone"):
        scorer.score("a", ["b"] * 200)
    assert len(scorer.score("a", ["b"])) == 1


def test_several_devices_share_one_queue_and_keep_the_order() -> None:
    passages = [f"panda number {i}" for i in range(200)]
    with Scorer(MODEL) as one, Scorer(MODEL, device=["cpu", "cpu"], max_batch_tokens=128) as two:
        assert two.score("panda", passages) == pytest.approx(one.score("panda", passages), abs=1e-5)


def test_a_device_that_cannot_load_fails_the_first_call_not_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the first device to load enough, scores would come until the other one has failed."""
    init, loaded = Worker.__init__, threading.Event()

    def full(self: Worker, settings: RerankSettings, device_name: str, *arguments: Any) -> None:
        if device_name == "cpu:0":
            assert loaded.wait(30)
            time.sleep(0.3)
            raise torch.OutOfMemoryError("no room for the weights")
        init(self, settings, device_name, *arguments)
        loaded.set()

    monkeypatch.setattr(Worker, "__init__", full)
    with (
        Scorer(MODEL, device=["cpu", "cpu:0"]) as scorer,
        pytest.raises(torch.OutOfMemoryError, match="no room for the weights"),
    ):
        scorer.score("a", ["b"])


def test_close_fails_what_still_waits_and_frees_the_model() -> None:
    import gc
    import weakref

    scorer = Scorer(MODEL, max_batch_tokens=64, query_instruction="to be closed ")
    scorer.warmup()
    model = weakref.ref(scorer._lease.acquired().loaded.result()._backbone)  # type: ignore[attr-defined]
    outcome: list[str] = []

    def ask() -> None:
        try:
            scorer.score("a", ["panda " * 300] * 3000)
        except RuntimeError as error:
            outcome.append(str(error))

    waiting = threading.Thread(target=ask)
    waiting.start()
    waiting.join(0.2)
    scorer.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert "closed" in outcome[0]
    gc.collect()
    assert model() is None


def test_a_device_that_is_not_there_lists_those_that_are() -> None:
    assert available_devices()[-1] == "cpu"
    missing = "cuda:7" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=rf"device='{missing}': not on this machine, which has .*cpu"):
        choose_device(missing)
    with pytest.raises(ValueError, match="device='hpu:3': not on this machine"):
        Scorer(MODEL, device="hpu:3").score("a", ["b"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_a_gpu_is_found_with_and_without_its_number(
    name: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare "cuda" was refused on machines that have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(choose_device(name)) == expected
    with pytest.raises(ValueError, match="device='cuda:2': not on this machine, which has cuda:0, cuda:1, cpu"):
        choose_device("cuda:2")
    with pytest.raises(ValueError, match="device='mps': not on this machine, which has cuda:0, cuda:1, cpu"):
        choose_device("mps")


def test_a_gpu_that_torch_cannot_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver is too old for torch, its GPUs are counted; the default device was then one of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(choose_device(None)) == "cpu"


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "float16_is_safe", "expected"),
    [
        ("auto", "cpu", None, True, torch.float32),
        ("float16", "cpu", None, True, torch.float16),
        ("auto", "cuda", (9, 0), True, torch.bfloat16),
        ("auto", "cuda", (7, 5), True, torch.float16),
        ("auto", "cuda", (7, 5), False, torch.float32),
        ("auto", "mps", None, True, torch.float32),
        ("fast", "mps", None, True, torch.float16),
        ("fast", "mps", None, False, torch.float32),
    ],
)
def test_precision_follows_the_device_and_the_family(
    dtype: str,
    device: str,
    capability: tuple[int, int] | None,
    float16_is_safe: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(dtype, torch.device(device), float16_is_safe=float16_is_safe).dtype == expected


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_on_a_cpu_is_bfloat16_only_where_the_processor_multiplies_it(
    has: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False})
    assert choose_precision("fast", torch.device("cpu"), float16_is_safe=True).dtype == expected
