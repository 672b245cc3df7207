"""Many callers, long jobs, bounds: what a service needs of a scorer."""

import asyncio
import gc
import itertools
import logging
import resource
import threading
import time
import unicodedata
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, printed_by
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from strategies import texts
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from bge_rerank_plugins import Scorer, call
from bge_rerank_plugins.call import ENCODE_AT_ONCE, PAIRS_AHEAD
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.engine import QueueFullError
from bge_rerank_plugins.core.packing import Pack
from bge_rerank_plugins.core.room import Room
from bge_rerank_plugins.core.schedule import Job, Request, Schedule
from bge_rerank_plugins.core.sequences import TokenSequence
from bge_rerank_plugins.core.tokenizer import load_tokenizer
from bge_rerank_plugins.core.windows import _spans, split_text
from bge_rerank_plugins.settings import RerankSettings
from bge_rerank_plugins.turns import Turns

ENCODER, DECODER, LAYERWISE = (str(DATA / family) for family in ("encoder", "decoder", "layerwise"))


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(ENCODER) as scorer:
        yield scorer


# Several queries at once


def test_a_batch_scores_as_its_requests_do(scorer: Scorer) -> None:
    requests = [("a", ["x", "y"]), ("b", []), ("c", [f"z {i}" for i in range(70)])]
    expected = [scorer.score(query, passages) for query, passages in requests]
    for scores in (scorer.score_batch(requests), asyncio.run(scorer.ascore_batch(requests))):
        assert [len(each) for each in scores] == [2, 0, 70]
        assert [s for each in scores for s in each] == pytest.approx([s for each in expected for s in each], abs=1e-5)


def test_an_empty_batch_needs_no_model() -> None:
    scorer = Scorer("/no/such/model")
    assert scorer.score_batch([]) == []
    assert scorer.score_batch([("a", [])]) == [[]]
    assert asyncio.run(scorer.ascore_batch([("a", [])])) == [[]]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (["ab"], r"requests\[0\]: expected \(query, passages\)"),
        ([("a", ["b"]), ("c", [None])], r"requests\[1\]: passages\[0\]=None"),
        ([(None, ["b"])], r"requests\[0\]: query=None"),
        ([("a",)], r"requests\[0\]: expected"),
        (None, r"requests=None: expected a list of \(query, passages\)"),
    ],
)
def test_a_batch_names_the_request_that_is_wrong(scorer: Scorer, requests: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score_batch(requests)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        asyncio.run(scorer.ascore_batch(requests))  # type: ignore[arg-type]


# Streams


def test_a_stream_scores_in_order_and_reads_a_bounded_way_ahead(scorer: Scorer) -> None:
    drawn = 0

    def pairs() -> Iterator[tuple[str, str]]:
        nonlocal drawn
        for i in range(3 * PAIRS_AHEAD):
            drawn += 1
            yield f"query {i // 100}", f"passage {i % 7}"

    stream = scorer.score_stream(pairs())
    first = [next(stream) for _ in range(10)]
    assert 10 < drawn < PAIRS_AHEAD + 200
    rest = list(stream)
    assert len(first + rest) == 3 * PAIRS_AHEAD
    expected = {f"query {i}": scorer.score(f"query {i}", [f"passage {j}" for j in range(7)]) for i in (0, 30, 60)}
    for i in (0, 3050, 6001):
        assert (first + rest)[i] == pytest.approx(expected[f"query {i // 100}"][i % 7], abs=1e-5)


def test_a_slow_device_is_not_run_away_from(scorer: Scorer) -> None:
    drawn = 0

    def pairs() -> Iterator[tuple[str, str]]:
        nonlocal drawn
        for drawn in range(4 * PAIRS_AHEAD):  # noqa: B007
            yield "a", "panda " * 100

    stream = scorer.score_stream(pairs())
    for scored in range(1, 200):
        next(stream)
        assert drawn < scored + PAIRS_AHEAD + 200
    stream.close()  # type: ignore[attr-defined]


def test_a_stream_keeps_a_slow_device_supplied_to_its_end_and_goes_no_further_ahead(
    encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pack begins when as many pairs are drawn as may be; were scores not counted off, that would be so for the first."""
    ahead, pairs, drawn, scored = 4 * ENCODE_AT_ONCE, 1000, 0, 0
    monkeypatch.setattr(call, "PAIRS_AHEAD", ahead)
    most, reached = 0, list[bool]()

    def drawing() -> Iterator[tuple[str, str]]:
        nonlocal drawn, most
        for drawn in range(1, pairs + 1):
            most = max(most, drawn - scored)
            yield "a", "panda"

    with Scorer(encoder_dir, query_instruction="slow ") as scorer:
        scorer.warmup()
        family: Any = scorer._lease.loaded()[1]
        forward = family.forward

        def slow(*arguments: Any) -> Any:
            until = time.monotonic() + 10
            while drawn < pairs and drawn - scored <= ahead and all(reached) and time.monotonic() < until:
                time.sleep(0.0005)
            reached.append(drawn == pairs or drawn - scored > ahead)
            time.sleep(0.01)
            return forward(*arguments)

        family.forward = slow
        for _ in scorer.score_stream(drawing()):
            scored += 1
    assert scored == pairs
    assert len(reached) > 3
    assert all(reached)
    assert ahead < most <= ahead + 2 * ENCODE_AT_ONCE


def test_a_stream_yields_what_comes_before_a_bad_pair(scorer: Scorer) -> None:
    got: list[float] = []
    stream = scorer.score_stream([("a", "x"), ("a", "y"), ("b", "x"), ("b", None)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"pairs\[3\]\[1\]=None"):
        got.extend(stream)
    assert got == pytest.approx(scorer.score_pairs([("a", "x"), ("a", "y"), ("b", "x")]), abs=1e-5)


@pytest.mark.parametrize("before", [0, 3, 40])
def test_a_stream_yields_what_came_before_its_iterator_failed(scorer: Scorer, before: int) -> None:
    """Up to two thousand pairs were drawn, and their scores lost."""
    lost = ConnectionError("the other side is gone")

    def pairs() -> Iterator[tuple[str, str]]:
        for number in range(before):
            yield "a", f"passage {number}"
        raise lost

    got: list[float] = []
    with pytest.raises(ConnectionError) as caught:
        got.extend(scorer.score_stream(pairs()))
    assert caught.value is lost
    assert got == pytest.approx(scorer.score("a", [f"passage {number}" for number in range(before)]), abs=1e-5)


def test_a_stream_that_is_left_cancels_what_it_queued(scorer: Scorer) -> None:
    stream = scorer.score_stream(("a", "panda " * 300) for _ in itertools.count())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert scorer.stats()["queued_tokens"] == 0


# Fairness, cancellation


def test_a_short_request_is_not_held_up_by_a_long_job(scorer: Scorer) -> None:
    """In packs, not seconds: 20 passages of two packs wait at most for three more."""
    left = threading.Event()
    stream = scorer.score_stream(("long job", "panda " * 20) for _ in range(50_000))
    next(stream)  # some thousand of its pairs are queued

    def drain() -> None:
        while not left.is_set():
            next(stream)

    job = threading.Thread(target=drain)
    job.start()
    passages = ["bear " * 200] * 20
    before = scorer.stats()["packs"]
    scores = scorer.score("short", passages)
    packs = scorer.stats()["packs"] - before
    left.set()
    job.join()
    stream.close()  # type: ignore[attr-defined]
    assert len(scores) == 20
    tokens = 20 * 210
    assert packs <= -(-tokens // 2048) + 3


def test_a_short_request_is_not_held_up_by_long_passages_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job counted its passages, and every window was taken off: after so many of them it went before all others."""
    bear = Tokenizer.from_file(f"{ENCODER}/tokenizer.json").encode("bear", add_special_tokens=False).ids[-1]
    held, goes_on = threading.Event(), threading.Event()
    has_the_short_one: list[bool] = []
    options: dict[str, Any] = {"max_length": 64, "max_batch_tokens": 512, "long_passages": "split"}
    with Scorer(ENCODER, **options) as scorer, ThreadPoolExecutor(2) as pool:
        family: Any = scorer._lease.acquired().loaded.result()
        forward = family.forward

        def holding(pack: Pack, cutoff_layers: tuple[int, ...]) -> Tensor:
            has_the_short_one.append(bool((pack.input_ids == bear).any()))
            if len(has_the_short_one) == 3:  # many more windows than passages are done
                held.set()
                goes_on.wait(timeout=30)
            scores: Tensor = forward(pack, cutoff_layers)
            return scores

        monkeypatch.setattr(family, "forward", holding)
        long = pool.submit(scorer.score, "long job", [f"{number} " + "panda " * 5000 for number in range(4)])
        assert held.wait(timeout=30)
        waiting = scorer.stats()["queued_tokens"]
        short = pool.submit(scorer.score, "short", ["bear"])
        while scorer.stats()["queued_tokens"] == waiting:
            time.sleep(0.001)
        goes_on.set()
        assert len(short.result()) == 1
        assert len(long.result()) == 4
    assert has_the_short_one.index(True) == 3  # the next one
    assert len(has_the_short_one) > 20


async def test_a_call_that_times_out_drops_its_pairs(scorer: Scorer) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(scorer.ascore("a", ["panda " * 400] * 2000), timeout=0.2)
    await scorer.ascore("b", ["bear"])
    assert scorer.stats()["queued_tokens"] == 0


# Bounds


def test_a_full_queue_is_an_error_or_a_wait_by_choice() -> None:
    passages = ["panda " * 50] * 150
    with Scorer(ENCODER, max_queued_tokens=3000, when_full="wait") as patient:
        patient.warmup()
        with Scorer(ENCODER) as free:
            expected = free.score("a", passages)
        assert patient.score("a", passages) == pytest.approx(expected, abs=1e-5)
        assert asyncio.run(patient.ascore("a", passages)) == pytest.approx(expected, abs=1e-5)
    with Scorer(ENCODER, max_queued_tokens=3000, when_full="error") as strict:
        assert strict.score("a", passages) == pytest.approx(
            expected, abs=1e-5
        )  # nobody else is there: it waits for itself
        stream = strict.score_stream(("a", "panda " * 100) for _ in range(10_000))
        next(stream)
        with pytest.raises(QueueFullError, match=r"tokens wait already, and max_queued_tokens=3000"):
            strict.score("b", passages)
        with pytest.raises(QueueFullError):
            asyncio.run(strict.ascore("b", passages))
        stream.close()  # type: ignore[attr-defined]
        assert len(strict.score("a", ["b"])) == 1


def test_a_stream_that_was_let_in_is_not_turned_away_later(encoder_dir: str) -> None:
    """It counted as new whenever all that it had queued was scored, and broke off in the middle."""
    with Scorer(encoder_dir, max_queued_tokens=3000, when_full="error") as strict:
        stream = strict.score_stream(("a", "panda " * 20) for _ in range(640))
        scores = [next(stream)]
        stop = threading.Event()

        def fill() -> None:
            while not stop.is_set():
                with suppress(QueueFullError):
                    strict.score("b", ["panda " * 50] * 20)

        others = [threading.Thread(target=fill) for _ in range(3)]
        for other in others:
            other.start()
        try:
            scores += stream
        finally:
            stop.set()
            for other in others:
                other.join()
        assert len(scores) == 640


def test_small_calls_do_not_pass_a_large_one_for_ever(encoder_dir: str) -> None:
    """All who waited were woken at once, and the smallest found room first, again and again."""
    with Scorer(encoder_dir, max_queued_tokens=1000, max_batch_tokens=256) as scorer:
        scorer.warmup()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                scorer.score("panda", ["bear " * 5] * 4)

        small = [threading.Thread(target=ask) for _ in range(12)]
        for thread in small:
            thread.start()
        try:
            with ThreadPoolExecutor(1) as pool:  # the second one is larger than the bound
                for count in (8, 60):
                    assert len(pool.submit(scorer.score, "panda", ["panda " * 60] * count).result(timeout=60)) == count
        finally:
            stop.set()
            for thread in small:
                thread.join()
        assert scorer.stats()["queued_tokens"] == 0


def test_who_may_not_wait_does_not_pass_those_who_were_let_in_before() -> None:
    """What such a call had left took its turn behind all others that came, for as long as they did."""

    def request(tokens: int) -> Request:
        return Request([TokenSequence([0] * tokens)], Job(1))

    queue = Schedule()
    room = Room(100, queue)
    assert room.enter(request(60), may_wait=False)
    first, second = request(50), request(50)
    assert room.enter(first, may_wait=True)
    assert room.enter(second, may_wait=True)
    for _ in range(5):  # as much as the first of them has itself
        passing = request(10)
        assert room.enter(passing, may_wait=False)
        passing.future.cancel()  # there is room again
    assert not room.enter(request(10), may_wait=False)
    assert "160 tokens wait already, and max_queued_tokens=100 leaves no" in room.refusal(request(10))
    first.future.cancel()  # nobody waits for it any more
    assert room.enter(request(10), may_wait=False)


def test_a_long_call_that_was_let_in_does_not_keep_short_ones_out(encoder_dir: str) -> None:
    """All that was refused while the rest of it waited was most of what came."""
    with Scorer(encoder_dir, max_queued_tokens=4000, max_batch_tokens=512, when_full="error") as scorer:
        stream = scorer.score_stream(("long", "panda " * 10) for _ in range(640))
        drawn = 0
        for drawn, _ in enumerate(stream, start=1):
            if drawn % 64 == 0:
                assert len(scorer.score("short", ["a bear"])) == 1
        assert drawn == 640


def test_who_alone_is_more_than_may_wait_is_told_so() -> None:
    """It was told of a few tokens that wait, and to try again later."""
    queue = Schedule()
    room = Room(100, queue)
    few, many = (Request([TokenSequence([0] * tokens)], Job(1)) for tokens in (100, 101))
    assert room.enter(few, may_wait=False)
    assert room.refusal(few).endswith(
        "100 tokens wait already, and max_queued_tokens=100 leaves no room for 100 more: try again later"
    )
    assert "for 101 more, which get in only while nothing else waits: give fewer passages at once" in room.refusal(many)


async def test_room_that_nobody_waits_for_any_more_is_given_to_others(encoder_dir: str) -> None:
    with Scorer(encoder_dir, max_queued_tokens=600, max_batch_tokens=256) as scorer:
        scorer.warmup()
        passages = ["panda " * 60] * 40
        for delay in (0.0, 0.01, 0.03, 0.06, 0.1):
            calls = [asyncio.ensure_future(scorer.ascore(f"q {i}", passages)) for i in range(6)]
            await asyncio.sleep(delay)
            for call in calls[:5]:
                call.cancel()
            assert len(await asyncio.wait_for(calls[5], timeout=60)) == 40
        assert scorer.stats()["queued_tokens"] == 0
        assert not [request for request in scorer._lease.acquired()._room._outside if not request.finished]


def test_the_queue_never_holds_more_than_its_bound(encoder_dir: str) -> None:
    most = 0.0
    with Scorer(encoder_dir, max_queued_tokens=5000, max_batch_tokens=512) as scorer:
        scorer.warmup()
        threads = [
            threading.Thread(target=scorer.score, args=(f"q {i}", ["panda " * 20] * 100), daemon=True) for i in range(6)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, scorer.stats()["queued_tokens"])
            time.sleep(0.001)
    assert 0 < most <= 5000


# What one sees


def test_stats_count_what_was_done(encoder_dir: str) -> None:
    with Scorer(encoder_dir, max_length=20, max_batch_tokens=100) as scorer:
        assert set(scorer.stats().values()) == {0}
        scorer.score("panda", ["bear " * 50, "hi", "hi"])
        scorer.score_batch([("a", ["b"]), ("c", ["d"])])
        stats = scorer.stats()
    assert (stats["requests"], stats["pairs"], stats["truncated"], stats["out_of_memory"]) == (2, 5, 1, 0)
    assert stats["tokens"] > 40
    assert 1 <= stats["packs"] <= 5
    assert 0 < stats["mean_fill"] <= 1
    assert stats["device_seconds"] > 0


def test_truncation_is_warned_of_once_with_the_count(encoder_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    with Scorer(encoder_dir, max_length=20) as scorer, caplog.at_level(logging.WARNING, "bge_rerank_plugins"):
        scorer.score("panda", ["hi"])
        assert caplog.records == []
        scorer.score("panda", ["bear " * 50, "hi", "bear " * 60])
        scorer.score("panda", ["bear " * 50])
        asyncio.run(scorer.ascore("panda", ["bear " * 50]))
    assert [record.getMessage().split("; ")[0] for record in caplog.records] == [
        f"{encoder_dir}: passages were cut to fit max_length=20 tokens together with the query, 2 in this call"
    ]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "long_passages='split' scores them whole"),
        ({"long_passages": "split", "query_max_length": 20}, "a smaller query_max_length leaves them room"),
    ],
)
def test_the_advice_is_not_what_is_done_already(
    options: dict[str, object], advice: str, encoder_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Scorer(encoder_dir, max_length=20, **options) as scorer,  # type: ignore[arg-type]
        caplog.at_level(logging.WARNING, "bge_rerank_plugins"),
    ):
        scorer.score("panda " * 30, ["bear " * 50])
    assert [record.getMessage().split("; ")[1] for record in caplog.records] == [f"{advice} (said once per scorer)"]


# Long passages


@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_a_query_that_leaves_no_room_makes_one_window(family: str) -> None:
    """It made one of every token, each cut to nothing, or none, which failed the call."""
    query, passages = "what is a panda " * 400, ["", "panda is " * 200]
    options = {"query_max_length": 64, "max_length": 64}
    with (
        Scorer(str(DATA / family), long_passages="split", **options) as split,  # type: ignore[arg-type]
        Scorer(str(DATA / family), **options) as cut,  # type: ignore[arg-type]
    ):
        assert split.score(query, passages) == pytest.approx(cut.score(query, passages), abs=1e-5)
        assert split.stats()["pairs"] == 4  # of both, which share an engine


@pytest.mark.parametrize("directory", [ENCODER, DECODER, LAYERWISE])
def test_a_long_passage_has_the_score_of_its_best_window(directory: str) -> None:
    long = " ".join(f"Item {i} describes panda number {i * 7 % 31} in Sichuan." for i in range(40))
    with (
        Scorer(directory, max_length=64, long_passages="split") as split,
        Scorer(directory, max_length=64) as cut,
    ):
        windows = split._lease.loaded()[1].windows("panda number 14", long)
        assert len(windows) > 5
        expected = max(cut.score("panda number 14", windows))
        assert split.score("panda number 14", ["hi", long, ""]) == pytest.approx(
            [*cut.score("panda number 14", ["hi"]), expected, *cut.score("panda number 14", [""])], abs=1e-5
        )
        assert expected > cut.score("panda number 14", [long])[0] - 1e-5
        assert split.stats()["truncated"] == 1  # the one that was cut, by the scorer beside it


@pytest.mark.parametrize("directory", [ENCODER, DECODER, LAYERWISE])
def test_a_window_fits_with_the_instructions_and_the_query(directory: str) -> None:
    long = " ".join(f"Item {i} describes panda number {i * 7 % 31} in Sichuan." for i in range(40))
    instructions = {"query_instruction": "Find what answers this: ", "passage_instruction": "A text from an archive: "}
    with Scorer(directory, max_length=64, long_passages="split", **instructions) as scorer:  # type: ignore[arg-type]
        scorer.score("panda number 14", [long])
        assert scorer.stats()["pairs"] > 5
        assert scorer.stats()["truncated"] == 0


def test_what_stands_at_the_end_of_a_window_is_repeated_in_the_next_one() -> None:
    """A quarter of it: an answer that a cut goes through would be whole in neither."""
    text = "the " * 99 + "the"  # a token each
    spans = list(_spans(TOKENIZER.backend_tokenizer, text, 16, ""))
    places = [(text[:start].count("the"), text[:stop].count("the")) for start, stop in spans]
    assert places == [(start, start + 16) for start in range(0, 85, 12)]


def test_layers_take_the_best_window_each() -> None:
    long = " ".join(f"Item {i} describes panda number {i}." for i in range(40))
    with Scorer(LAYERWISE, max_length=64, long_passages="split") as split, Scorer(LAYERWISE, max_length=64) as cut:
        windows = split._lease.loaded()[1].windows("panda", long)
        expected = cut.score_layers("panda", windows, [3, 11])
        got = split.score_layers("panda", [long], [3, 11])
    assert [got[3][0], got[11][0]] == pytest.approx([max(expected[3]), max(expected[11])], abs=1e-5)


@hypothesis_settings(max_examples=100)
@given(text=texts, room=st.sampled_from([1, 3, 8]))
def test_windows_leave_nothing_out_and_fit(text: str, room: int) -> None:
    tokenizer = TOKENIZER.backend_tokenizer
    spans = list(_spans(tokenizer, text, room, ""))
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    assert all(any(start <= a and b <= stop for start, stop in spans) for a, b in offsets)
    assert [text[start:stop] for start, stop in spans] == split_text(tokenizer, text, room)
    if room == 8:  # a single token may grow, cut out of its word
        assert all(len(tokenizer.encode(text[a:b], add_special_tokens=False).ids) <= room for a, b in spans)


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFKC()])
def test_windows_hold_letters_whole_that_the_tokenizer_composes(form: normalizers.Normalizer) -> None:
    """It says where the first character of a composed letter ends, and windows ended before the accent."""
    tokenizer = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    tokenizer.normalizer = form
    text = unicodedata.normalize("NFD", "Un café, où l'été dure. 한국어 문장을 읽는다. がぎぐ " * 5) + "cafe\u0301"
    spans = list(_spans(tokenizer, text, 12, ""))
    assert len(spans) > 5
    assert spans[-1][1] == len(text)
    assert not [
        stop
        for _, stop in spans[:-1]
        if unicodedata.normalize("NFC", text[stop - 1 : stop + 1]) != text[stop - 1 : stop + 1]
    ]


TOKENIZER = load_tokenizer(Checkpoint.from_settings(RerankSettings(model=ENCODER)))


# Many calls at once


def test_calls_that_begin_together_are_few_jobs_for_the_tokenizer(scorer: Scorer) -> None:
    thread = scorer._lease.acquired().tokenizer_thread
    submit, jobs = thread.submit, []

    def counted(*arguments: object) -> object:
        jobs.append(arguments)
        return submit(*arguments)  # type: ignore[arg-type]

    async def burst() -> list[list[float]]:
        return await asyncio.gather(*(scorer.ascore(f"query {i}", ["a", "b"]) for i in range(300)))

    thread.submit = counted  # type: ignore[assignment]
    try:
        scores = asyncio.run(burst())
    finally:
        thread.submit = submit  # type: ignore[method-assign]
    assert len(jobs) < 30
    for i in (0, 150, 299):
        assert scores[i] == pytest.approx(scorer.score(f"query {i}", ["a", "b"]), abs=1e-5)


def test_an_error_in_one_of_many_calls_is_that_calls_alone(scorer: Scorer) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def three() -> list[object]:
        turns = Turns(scorer._lease.acquired().tokenizer_thread)
        cancelled = turns.run(fail)
        cancelled.cancel()
        rest = [turns.run(partial(str, 1)), turns.run(fail), turns.run(partial(str, 2))]
        return await asyncio.gather(*rest, return_exceptions=True)

    first, second, third = asyncio.run(three())
    assert (first, third) == ("1", "2")
    assert isinstance(second, ZeroDivisionError)


@pytest.mark.parametrize("begun", [True, False])
def test_a_call_that_is_cancelled_at_the_tokenizer_holds_up_no_other_and_is_spared_if_it_has_not_begun(
    begun: bool,
) -> None:
    gate, entered, done = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        entered.set()
        gate.wait(30)

    async def cancelled() -> list[str]:
        with ThreadPoolExecutor(1) as thread:
            turns = Turns(thread)
            calls = [turns.run(first), *(turns.run(partial(done.append, name)) for name in ("second", "third"))]
            while not entered.is_set():
                await asyncio.sleep(0.001)
            calls[0 if begun else 1].cancel()
            gate.set()
            await asyncio.wait_for(calls[2], timeout=10)
            return done

    assert asyncio.run(cancelled()) == (["second", "third"] if begun else ["third"])


def test_closing_while_calls_wait_for_the_tokenizer_tells_every_one_of_them() -> None:
    async def closed_meanwhile() -> list[object]:
        scorer = Scorer(ENCODER, query_instruction="closed meanwhile ")
        scorer.warmup()
        thread, gate = scorer._lease.acquired().tokenizer_thread, threading.Event()
        thread.submit(gate.wait)
        calls = [asyncio.ensure_future(scorer.ascore("a", ["b"])) for _ in range(5)]
        await asyncio.sleep(0.05)
        late = asyncio.ensure_future(scorer.ascore("a", ["b"]))
        await asyncio.sleep(0)
        closing = asyncio.get_running_loop().run_in_executor(None, scorer.close)
        await asyncio.sleep(0.05)
        gate.set()
        await closing
        return await asyncio.wait_for(asyncio.gather(*calls, late, return_exceptions=True), timeout=20)

    assert all(isinstance(each, RuntimeError) for each in asyncio.run(closed_meanwhile()))


def test_a_loop_that_is_closed_with_a_call_just_begun_is_let_go() -> None:
    """What waited for its turn held the loop, and was held by the scorer."""
    with ThreadPoolExecutor(1) as thread:
        turns = Turns(thread)

        def closed_loop() -> weakref.ref[asyncio.AbstractEventLoop]:
            loop = asyncio.new_event_loop()

            def begin() -> None:
                turns.run(int)
                loop.stop()

            loop.call_soon(begin)
            loop.run_forever()
            loop.close()
            return weakref.ref(loop)

        loop = closed_loop()
        gc.collect()
        assert loop() is None
        assert asyncio.run(_result_of(turns)) == 0


async def _result_of(turns: Turns) -> object:
    return await turns.run(int)


def test_a_call_that_comes_after_the_tokenizer_has_stopped_is_told_that_the_scorer_is_closed(encoder_dir: str) -> None:
    """It was told of futures that cannot be scheduled."""
    scorer = Scorer(encoder_dir, query_instruction="late ")
    scorer.warmup()

    async def late() -> None:
        call = asyncio.ensure_future(scorer.ascore("a", ["b"]))
        await asyncio.sleep(0)  # it has found the model
        scorer.close()
        await call

    with pytest.raises(RuntimeError, match="the scorer is closed"):
        asyncio.run(late())


def test_tasks_are_served_after_the_main_thread_has_ended(encoder_dir: str) -> None:
    """Python stops every pool of threads then, and tasks were told that the scorer was closed, which threads went on using."""
    program = f"""
import asyncio, threading, time
from bge_rerank_plugins import Scorer
class Own(Scorer):
    def score(self, query, passages):
        return [1.0] * len(passages)
scorer, own = Scorer({encoder_dir!r}), Own({encoder_dir!r})
scorer.warmup()
async def serve():
    while threading.main_thread().is_alive():
        await asyncio.sleep(0.01)
    time.sleep(0.2)
    print(await scorer.ascore("panda", ["a bear"]) == scorer.score("panda", ["a bear"]))
    print(await own.ascore("panda", ["a bear"]))
threading.Thread(target=lambda: asyncio.run(serve())).start()
"""
    assert printed_by(program) == "True\n[1.0]\n"


# The soak test


def resident_bytes() -> int:
    """Memory of this process that is in use; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0


def test_soak() -> None:
    """64 threads and 256 tasks, mixed sizes, families and cancellations: every result is the sequential one, and the
    second half of the 20,000 pairs takes no memory that the first did not.

    Not bit for bit: the size of a pack decides how the processor blocks its products, which changes the last digits. The
    scores reach 3.9; they agree to a millionth of that.
    """
    others = {thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank")}
    families = {directory: Scorer(directory, max_batch_tokens=1024) for directory in (ENCODER, DECODER, LAYERWISE)}
    words = ["panda", "bear", "Sichuan", "datetime", "parses", "string", "熊猫", "🐼"]

    def job(number: int) -> tuple[str, str, list[str]]:
        count = (0, 1, 2, 5, 40)[number % 5]
        passages = [" ".join(words[(number + i) % 8] for _ in range(1 + (number * i) % 30)) for i in range(count)]
        return [ENCODER, ENCODER, DECODER, LAYERWISE][number % 4], f"query {words[number % 8]} {number % 16}", passages

    kinds = [job(number) for number in range(80)]
    expected = [families[directory].score(query, passages) for directory, query, passages in kinds]
    tolerance = 1e-6 * max(abs(score) for scores in expected for score in scores)
    threads_before = threading.active_count()
    wrong: list[int] = []
    done = itertools.count()

    def check(number: int, scores: list[float]) -> None:
        next(done)
        if scores != pytest.approx(expected[number % 80], abs=tolerance):
            wrong.append(number)

    def ask(caller: int) -> None:
        for number in range(caller, caller + 10):
            directory, query, passages = kinds[number % 80]
            check(number, families[directory].score(query, passages))

    async def aask(caller: int) -> None:
        for number in range(caller, caller + 2):
            directory, query, passages = kinds[number % 80]
            if number % 7 == 0:
                call = asyncio.ensure_future(families[directory].ascore(query, passages))
                await asyncio.sleep(0)
                call.cancel()
                try:
                    check(number, await call)
                except asyncio.CancelledError:
                    continue
            else:
                check(number, await families[directory].ascore(query, passages))

    async def tasks() -> None:
        await asyncio.gather(*(aask(caller) for caller in range(256)))

    failed: Future[None] = Future()

    def guarded(caller: int) -> None:
        try:
            ask(caller)
        except BaseException as error:  # the thread must not take its failure with it
            failed.set_exception(error)

    resident = []
    for _ in range(2):
        threads = [threading.Thread(target=guarded, args=(caller,)) for caller in range(64)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join()
        gc.collect()
        resident.append(resident_bytes())
    assert not failed.done(), failed.exception()
    assert wrong == []
    assert next(done) > 2 * (64 * 10 + 256)
    assert all(scorer.stats()["queued_tokens"] == 0 for scorer in families.values())
    pairs = sum(scorer.stats()["pairs"] for scorer in families.values())
    assert pairs > 20_000
    assert resident[1] - resident[0] < 64 * 2**20
    assert threading.active_count() <= threads_before + len(families)  # a thread each that tokenises for tasks
    for scorer in families.values():
        scorer.close()
    assert {thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank-device")} <= others
