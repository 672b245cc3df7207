"""What goes into the next pack."""

import math
from itertools import chain, repeat, takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_plugins.core.schedule import Job, Pair, Request, Schedule
from bge_rerank_plugins.core.sequences import TokenSequence


def request(*lengths: int) -> Request:
    return Request([TokenSequence([0] * length) for length in lengths], Job(len(lengths)))


def tokens(pairs: list[Pair]) -> int:
    return sum(len(pair.sequence) for pair in pairs)


def scheduled(*requests: Request) -> Schedule:
    schedule = Schedule()
    for each in requests:
        schedule.add(each)
    return schedule


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@given(st.lists(lengths, min_size=1, max_size=6), st.integers(1, 60))
def test_every_pair_is_handed_out_once_in_packs_within_the_budget(requests: list[list[int]], budget: int) -> None:
    waiting = [request(*each) for each in requests]
    schedule = scheduled(*waiting)
    handed_out: list[Pair] = []
    while schedule:
        pairs = schedule.take(budget)
        assert pairs
        assert tokens(pairs) <= budget or len(pairs) == 1
        handed_out += pairs
    assert sorted((p.request.arrival, p.index) for p in handed_out) == [
        (each.arrival, index) for each in waiting for index in range(len(each.sequences))
    ]
    assert all(each.tokens_left == 0 for each in waiting)


def test_one_pack_takes_pairs_of_all_waiting_requests() -> None:
    pairs = scheduled(request(10), request(10), request(10)).take(100)
    assert len({pair.request for pair in pairs}) == 3


def test_a_short_request_overtakes_a_long_job() -> None:
    """First come, first served would let 50,000 pairs hold up a user's 20."""
    job = request(*[100] * 50_000)
    schedule = scheduled(job)
    schedule.take(2000)
    short = request(*[100] * 20)
    schedule.add(short)
    alone = 1
    packs = 0
    while short.taken < len(short.sequences):
        schedule.take(2000)
        packs += 1
    assert packs <= alone + 2  # and one more for the pack that was running


def test_a_long_job_in_many_small_requests_is_still_a_long_job() -> None:
    """Callers submit what they have tokenised; were each piece taken for a short request, a user would queue behind all."""
    job = Job(3200)
    schedule = scheduled(*(Request([TokenSequence([0] * 100)] * 32, job) for _ in range(100)))
    user = request(*[100] * 60)
    schedule.add(user)
    packs = 0
    while user.taken < len(user.sequences):
        schedule.take(2000)
        packs += 1
    assert packs <= 3 + 1


def after(layers: tuple[int, ...], count: int) -> Request:
    return Request([TokenSequence([0] * 100)] * count, Job(count), layers)


@pytest.mark.parametrize(("long", "short"), [((), (8, 28)), ((8, 28), ()), ((8,), (28,)), ((), ())])
def test_a_short_request_overtakes_a_long_job_that_is_scored_after_other_layers(
    long: tuple[int, ...], short: tuple[int, ...]
) -> None:
    """A pack began with the oldest job, which left no room for others' layers: a short request waited for all of it."""
    schedule = scheduled(after(long, 50_000))
    for begun in range(9):  # wherever its own packs are
        schedule.take(2000)
        user = after(short, 20 + begun)
        schedule.add(user)
        packs = 0
        while user.taken < len(user.sequences):
            schedule.take(2000)
            packs += 1
        assert packs <= 3


def test_a_request_that_is_scored_after_other_layers_moves_beside_many_shorter_ones() -> None:
    schedule = scheduled(after((), 100_000))
    user, other = after((8,), 20), after((9,), 20)
    schedule.add(user)
    schedule.add(other)
    for _ in range(3 * 8):
        schedule.add(after((), 1))
        schedule.take(2000)
    assert user.taken == other.taken == 20


def test_a_long_job_that_is_scored_after_other_layers_always_moves() -> None:
    job = after((8,), 1000)
    schedule = scheduled(job)
    for _ in range(10):
        before = job.taken
        for _ in range(8):
            schedule.add(after((), 40))
            schedule.take(2000)
        assert job.taken > before


def test_a_long_job_always_moves() -> None:
    """Shortest first alone would starve it for as long as short requests keep coming."""
    job = request(*[100] * 1000)
    schedule = scheduled(job)
    for _ in range(100):
        for _ in range(5):
            schedule.add(request(*[100] * 10))
        before = job.taken
        schedule.take(2000)
        assert job.taken > before


def test_a_long_job_in_many_small_requests_always_moves() -> None:
    """What it submits as it goes on came after all others; its share went to whose request had waited longest."""
    job = Job(math.inf)
    schedule = scheduled(Request([TokenSequence([0] * 100)] * 4, job), request(*[100] * 1000))
    for _ in range(40):
        assert any(pair.request.job is job for pair in schedule.take(2000))
        schedule.add(Request([TokenSequence([0] * 100)] * 2, job))


def test_a_cancelled_request_is_handed_out_no_more() -> None:
    first, second = request(5, 5, 5), request(5)
    schedule = scheduled(first, second)
    assert first.future.cancel()
    assert [pair.request for pair in schedule.take(100)] == [second]
    assert not schedule
    assert schedule.tokens == 0


def test_what_is_put_back_comes_first_and_keeps_its_place() -> None:
    only = request(5, 5, 5, 5)
    schedule = scheduled(only)
    schedule.put_back(schedule.take(10))
    schedule.put_back(schedule.take(5))
    assert schedule.tokens == 20
    assert [pair.index for pair in schedule.take(5)] == [0]
    assert [pair.index for pair in schedule.take(5)] == [1]
    assert [pair.index for pair in schedule.take(10)] == [2, 3]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), lengths),
        st.tuples(st.sampled_from(["take", "take and put back", "take and put back"]), st.integers(1, 60)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_is_added_put_back_and_cancelled_every_pair_that_is_waited_for_comes_once_and_in_order(
    steps: list[tuple[str, Any]],
) -> None:
    schedule, requests, scored = Schedule(), list[Request](), list[Pair]()
    for step, value in chain(steps, takewhile(lambda _: schedule, repeat(("take", 60)))):
        if step == "add":
            requests.append(request(*value))
            schedule.add(requests[-1])
        elif step == "cancel" and value < len(requests):
            requests[value].future.cancel()
        elif step != "cancel":
            pairs = schedule.take(value)
            assert not any(pair.request.finished for pair in pairs)
            if step == "take":
                scored += pairs
            else:
                schedule.put_back(pairs)
        waited_for = [each for each in requests if not each.finished]
        done = {(pair.request.arrival, pair.index) for pair in scored}
        missing = [len(s) for r in waited_for for i, s in enumerate(r.sequences) if (r.arrival, i) not in done]
        assert schedule.tokens == sum(missing)
        assert bool(schedule) == bool(missing)
    for each in requests:
        places = [pair.index for pair in scored if pair.request is each]
        assert places == list(range(len(places) if each.finished else len(each.sequences)))


def test_a_shared_prefix_counts_once_against_the_budget() -> None:
    shared = Request([TokenSequence([0] * 10, prefix=8, group=1) for _ in range(5)], Job(5))
    assert len(scheduled(shared).take(18)) == 5


def test_a_kept_prefix_does_not_count_and_is_kept_while_pairs_that_share_it_wait() -> None:
    shared = Request([TokenSequence([0] * 10, prefix=8, group=1) for _ in range(5)], Job(5))
    schedule = scheduled(shared)
    assert [pair.prefix_is_needed_again for pair in schedule.take(12)] == [True, True]
    assert [pair.prefix_is_needed_again for pair in schedule.take(4, kept=[1])] == [True, True]
    assert [pair.prefix_is_needed_again for pair in schedule.take(4, kept=[1])] == [False]
    alone = scheduled(Request([TokenSequence([0] * 10), TokenSequence([0] * 10)], Job(2)))
    assert [pair.prefix_is_needed_again for pair in alone.take(10)] == [False]


def test_drain_returns_every_request_once() -> None:
    first, second = request(5, 5), request(5)
    schedule = scheduled(first, second)
    schedule.put_back(schedule.take(5))
    assert set(schedule.drain()) == {first, second}
    assert not schedule
