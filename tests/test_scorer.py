"""`Scorer`: input to scores to ranking."""

import asyncio
import copy
import gc
import pickle
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import DATA, printed_by
from hypothesis import given
from hypothesis import strategies as st
from strategies import texts

from bge_rerank_plugins import RankedPassage, RerankSettings, Scorer
from bge_rerank_plugins.core.engine import key_of
from bge_rerank_plugins.core.worker import Worker
from bge_rerank_plugins.ranking import rank_scores, sigmoid

PASSAGES = [
    "hi",
    "The giant panda is a bear species endemic to China.",
    "",
    "datetime parses a string " * 30,
    "熊猫 🐼",
]


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    from conftest import DATA

    with Scorer(str(DATA / "encoder")) as scorer:
        yield scorer


def test_scores_are_python_floats_in_input_order(scorer: Scorer) -> None:
    scores = scorer.score("what is panda?", PASSAGES)
    assert [type(score) for score in scores] == [float] * len(PASSAGES)
    assert scores == pytest.approx([scorer.score("what is panda?", [passage])[0] for passage in PASSAGES], abs=1e-5)


@given(query=texts, passages=st.lists(texts, max_size=6))
def test_any_text_scores(scorer: Scorer, query: str, passages: list[str]) -> None:
    assert len(scorer.score(query, passages)) == len(passages)


def test_more_passages_than_are_tokenised_at_once_keep_their_order(scorer: Scorer) -> None:
    passages = [f"panda number {i}" for i in range(100)]
    scores = scorer.score("panda", passages)
    assert scores == pytest.approx(scorer.score("panda", passages[::-1])[::-1], abs=1e-5)
    assert len(set(scores)) > 50


def test_no_passages_need_no_model() -> None:
    scorer = Scorer("/no/such/model")
    assert scorer.score("a", []) == []
    assert scorer.score_pairs([]) == []
    assert list(scorer.score_stream([])) == []
    assert scorer.rank("a", []) == []
    assert asyncio.run(scorer.ascore("a", [])) == []
    assert asyncio.run(scorer.arank("a", [])) == []


def test_pairs_score_as_their_queries_do(scorer: Scorer) -> None:
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("a", "z")]
    assert scorer.score_pairs(pairs) == pytest.approx([scorer.score(q, [p])[0] for q, p in pairs], abs=1e-5)
    assert scorer.score_pairs(iter([["a", "x"]])) == pytest.approx(scorer.score("a", ["x"]), abs=1e-5)  # type: ignore[list-item]


def test_any_iterable_of_strings_will_do(scorer: Scorer) -> None:
    expected = scorer.score("a", ["x", "y"])
    assert scorer.score("a", ("x", "y")) == expected
    assert scorer.score("a", (text for text in "xy")) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "passages", "message"),
    [
        (None, ["a"], "query=None: expected a string, got NoneType"),
        (3, ["a"], "query=3: expected a string, got int"),
        (b"a", ["a"], "query=b'a': expected a string, got bytes"),
        ("a", "not a list", "passages='not a list': expected a list of strings"),
        ("a", None, "passages=None: expected a list of strings"),
        ("a", {"id": "text"}, "passages={'id': 'text'}: expected a list of strings"),
        ("a", {"text"}, "passages={'text'}: expected a list of strings"),
        ("a", ["x", None], r"passages\[1\]=None: expected a string, got NoneType"),
        ("a", ["x", 1.5], r"passages\[1\]=1.5: expected a string, got float"),
        ("a", np.array("one text"), r"passages=array\('one text'.*: expected a list of strings"),
        ("a", np.array([["a", "b"]]), r"passages=array\(\[\['a', 'b'\]\].*: expected a list of strings"),
        ("a", pd.DataFrame({"text": ["a"], "id": ["b"]}), r"passages=.*: expected a list of strings"),
        ("a", ["\ud800"], r"passages\[0\]='.ud800': not valid Unicode, surrogates not allowed at 0"),
        ("\udfff", ["a"], "query='.udfff': not valid Unicode"),
    ],
)
def test_what_is_not_text_is_refused_by_name(scorer: Scorer, query: object, passages: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(query, passages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        asyncio.run(scorer.ascore(query, passages))  # type: ignore[arg-type]


@pytest.mark.parametrize("pairs", [["ab"], [("a",)], [("a", "b", "c")], [None], [("a", None)], [(1, "b")]])
def test_what_is_not_a_pair_is_refused_by_place(scorer: Scorer, pairs: list[object]) -> None:
    with pytest.raises(ValueError, match=r"pairs\[0\]"):
        scorer.score_pairs(pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("pairs", [None, 3])
def test_what_is_no_list_of_pairs_is_refused_by_name(scorer: Scorer, pairs: object) -> None:
    for score in (scorer.score_pairs, scorer.score_stream):
        with pytest.raises(ValueError, match=rf"pairs={pairs}: expected a list of \(query, passage\)"):
            list(score(pairs))  # type: ignore[operator]


class Lengths(Scorer):
    """A scorer of somebody's own, with a constructor of its own, too."""

    def __init__(self, model: str, factor: float) -> None:
        super().__init__(model)
        self.factor = factor

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        return [self.factor * len(passage) for passage in passages]


class OnlyTwo(Lengths):
    """One that overrides something else, too."""

    async def ascore(self, query: str, passages: Sequence[str]) -> list[float]:
        return [2.0 for _ in passages]


async def test_a_subclass_that_overrides_score_means_every_way_to_score(encoder_dir: str) -> None:
    """Async forms, batches and pairs were scored by the model all the same, and an adapter ranked either way."""
    scorer, expected = Lengths(encoder_dir, -1), [-float(len(passage)) for passage in PASSAGES]
    pairs = [("panda", passage) for passage in PASSAGES]
    assert scorer.score("panda", PASSAGES) == expected
    assert await scorer.ascore("panda", PASSAGES) == expected
    assert scorer.score_pairs(pairs) == list(scorer.score_stream(pairs)) == expected
    assert scorer.score_batch([("panda", PASSAGES), ("a", [])]) == [expected, []]
    assert await scorer.ascore_batch([("panda", PASSAGES)]) == [expected]
    assert scorer.rank("panda", PASSAGES) == await scorer.arank("panda", PASSAGES)
    other = OnlyTwo(encoder_dir, -1)
    assert await other.ascore("panda", PASSAGES) == [2.0] * len(PASSAGES)
    assert other.score_pairs(pairs) == expected


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_copies_of_a_subclass_have_what_it_has(encoder_dir: str, copied: Callable[[Scorer], Scorer]) -> None:
    assert copied(Lengths(encoder_dir, 3)).score("a", ["bcd"]) == [9]


def test_normalize_is_the_sigmoid_of_the_raw_score(encoder_dir: str, scorer: Scorer) -> None:
    with Scorer(encoder_dir, normalize=True) as normalized:
        raw = scorer.score("panda", PASSAGES)
        assert normalized.score("panda", PASSAGES) == [sigmoid(score) for score in raw]
        assert asyncio.run(normalized.ascore("panda", PASSAGES)) == pytest.approx([sigmoid(score) for score in raw])
        assert normalized.score_pairs([("panda", p) for p in PASSAGES]) == pytest.approx([sigmoid(s) for s in raw])


def test_sigmoid_gives_the_published_values() -> None:
    """Raw and normalised scores side by side in the model card of bge-reranker-v2-m3."""
    published = {-5.65234375: 0.003497010252573502, -8.1875: 0.00027803096387751553, 5.26171875: 0.9948403768236574}
    for raw, normalised in published.items():
        assert sigmoid(raw) == pytest.approx(normalised, rel=1e-12)
    assert sigmoid(-1e4) == 0.0
    assert sigmoid(1e4) == 1.0


def test_rank_orders_by_score_and_cuts(scorer: Scorer) -> None:
    scores = scorer.score("panda", PASSAGES)
    ranking = scorer.rank("panda", PASSAGES)
    assert [passage.index for passage in ranking] == sorted(range(len(scores)), key=lambda i: -scores[i])
    assert [passage.score for passage in ranking] == sorted(scores, reverse=True)
    assert scorer.rank("panda", PASSAGES, top_n=2) == ranking[:2]
    assert scorer.rank("panda", PASSAGES, top_n=0) == []
    assert scorer.rank("panda", PASSAGES, top_n=99) == ranking
    assert [passage.index for passage in asyncio.run(scorer.arank("panda", PASSAGES, top_n=2))] == [
        passage.index for passage in ranking[:2]
    ]


scores_with_ties = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 7.0]) | st.floats(-9, 9), max_size=12)


LONG = "a bear " * 99
ALIKE = {"equal": ["a", "a", "b", "panda"] * 5, "equal once cut": [*[LONG + str(i) for i in range(12)], *"abcdefgh"]}


@pytest.mark.parametrize("alike", ALIKE)
@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_passages_that_are_alike_are_a_tie(family: str, alike: str) -> None:
    """What shares a pack moves the last digit, and the second of two equal passages could come first."""
    passages = ALIKE[alike]
    start = slice(len(LONG))
    same = [[i for i, text in enumerate(passages) if text[start] == passage[start]] for passage in passages]
    with Scorer(str(DATA / family), max_length=64, max_batch_tokens=256) as scorer:
        batch = scorer.score_batch([("panda", passages), ("panda", passages[::-1])])
        for scores in (
            scorer.score("panda", passages),
            asyncio.run(scorer.ascore("panda", passages)),
            scorer.score_pairs([("panda", text) for text in passages]),
            batch[0],
            batch[1][::-1],
            *(scorer.score_layers("panda", passages, [3, 9]).values() if family == "layerwise" else ()),
        ):
            for i, places in enumerate(same):
                assert {scores[place] for place in places} == {scores[i]}
        ranked = [index for index, _ in scorer.rank("panda", passages)]
        for places in same:
            assert [index for index in ranked if index in places] == places


@given(scores_with_ties, st.none() | st.integers(0, 14), st.none() | st.sampled_from([-1.5, 0.0, 0.25, 100.0]))
def test_ties_keep_the_input_order_and_the_threshold_comes_before_top_n(
    scores: list[float], top_n: int | None, threshold: float | None
) -> None:
    ranking = rank_scores(scores, top_n, threshold)
    kept = [i for i, score in enumerate(scores) if threshold is None or score >= threshold]
    expected = sorted(kept, key=lambda i: (-scores[i], i))
    assert ranking == [RankedPassage(i, scores[i]) for i in expected[: len(expected) if top_n is None else top_n]]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"top_n": -1}, "top_n=-1"),
        ({"top_n": 1.5}, r"top_n=1\.5"),
        ({"top_n": True}, "top_n=True"),
        ({"score_threshold": float("nan")}, "score_threshold=nan"),
        ({"score_threshold": "0.5"}, "score_threshold='0.5'"),
    ],
)
def test_an_impossible_cut_is_refused_before_anything_is_scored(cut: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer("/no/such/model").rank("a", ["b"], **cut)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        asyncio.run(Scorer("/no/such/model").arank("a", ["b"], **cut))  # type: ignore[arg-type]


def test_threads_get_the_scores_of_their_own_pairs(scorer: Scorer) -> None:
    """A shared tokenizer whose truncation is set per call, or a shared batch, mixes up concurrent calls."""
    jobs = [(f"query {i}", [f"passage {i} " * (j + 1) for j in range(i % 5 + 1)]) for i in range(60)]
    expected = [scorer.score(*job) for job in jobs]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda job: scorer.score(*job), jobs))
    assert [s for scores in together for s in scores] == pytest.approx(
        [s for scores in expected for s in scores], abs=1e-5
    )


async def test_tasks_get_the_scores_of_their_own_pairs(scorer: Scorer) -> None:
    jobs = [(f"query {i}", [f"passage {i} " * (j + 1) for j in range(i % 5 + 1)]) for i in range(60)]
    together = await asyncio.gather(*(scorer.ascore(*job) for job in jobs))
    expected = [scorer.score(*job) for job in jobs]  # also: works inside a running loop
    assert [s for scores in together for s in scores] == pytest.approx(
        [s for scores in expected for s in scores], abs=1e-5
    )


async def test_a_cancelled_call_leaves_the_scorer_usable(scorer: Scorer) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(scorer.ascore("panda", ["panda " * 400] * 400), timeout=0.05)
    assert len(await scorer.ascore("panda", ["bear"])) == 1


async def test_loading_and_scoring_do_not_block_the_event_loop(encoder_dir: str) -> None:
    longest = 0.0

    async def heartbeat() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.005)
            longest = max(longest, loop.time() - before)

    beat = asyncio.create_task(heartbeat())
    with Scorer(encoder_dir, passage_instruction="loaded here for the first time ") as fresh:
        started = asyncio.get_running_loop().time()
        await fresh.ascore("panda", ["panda " * 400] * 100)
        taken = asyncio.get_running_loop().time() - started
    beat.cancel()
    assert longest < max(0.25, taken / 2)


def test_a_closed_scorer_says_so_and_closes_twice(encoder_dir: str) -> None:
    scorer = Scorer(encoder_dir)
    scorer.warmup()
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.score("a", ["b"])
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(scorer.ascore("a", ["b"]))


def test_scorers_with_equal_settings_share_one_model_until_the_last_is_closed(encoder_dir: str) -> None:
    def workers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank-")}

    before = workers()
    first, second = (Scorer(encoder_dir, query_instruction="shared ") for _ in range(2))
    first.warmup()
    alone = workers()
    second.warmup()
    assert workers() == alone != before
    first.close()
    assert len(second.score("a", ["b"])) == 1
    second.close()
    assert workers() <= before


def test_a_scorer_that_is_forgotten_gives_its_model_back(encoder_dir: str) -> None:
    from bge_rerank_plugins.core import registry

    before = set(registry._engines)
    scorer = Scorer(encoder_dir, query_instruction="forgotten ")
    scorer.warmup()
    assert set(registry._engines) != before
    del scorer
    assert set(registry._engines) == before


def test_a_scorer_that_is_closed_and_then_forgotten_gives_its_model_back_once(encoder_dir: str) -> None:
    """The second time it was taken from another scorer, under its running calls."""
    first, second = (Scorer(encoder_dir, query_instruction="given back ") for _ in range(2))
    with second:
        first.warmup()
        second.warmup()
        first.close()
        del first
        second.warmup()
        assert second.stats()["requests"] == 3


async def test_a_model_that_died_is_followed_by_another_for_tasks_too_and_leaves_no_thread(encoder_dir: str) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank-")}

    others = threads()
    with Scorer(encoder_dir, query_instruction="died ") as scorer:
        expected = await scorer.ascore("a", ["b"])
        family: Any = scorer._lease.loaded()[1]
        family.forward = lambda *_: sys.exit("the worker is gone")
        dead = threads() - others
        with pytest.raises(RuntimeError, match="the worker is gone"):
            await scorer.ascore("a", ["b"])
        assert await scorer.ascore("a", ["b"]) == pytest.approx(expected)
        for thread in dead:
            thread.join(timeout=5)
        assert len(dead) == 2
        assert not dead & threads()


async def test_who_does_not_wait_for_a_load_any_more_does_not_stop_it_for_others(
    encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, init = threading.Event(), threading.Event(), Worker.__init__

    def slow(self: Worker, *arguments: Any) -> None:
        begun.set()
        gate.wait(30)
        init(self, *arguments)

    monkeypatch.setattr(Worker, "__init__", slow)
    with Scorer(encoder_dir, query_instruction="slow to load ") as scorer:
        first, second = (asyncio.ensure_future(scorer.ascore("a", ["b"])) for _ in range(2))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        assert len(await asyncio.wait_for(second, timeout=30)) == 1
        assert first.cancelled()


async def test_who_does_not_wait_for_a_load_that_fails_hears_nothing_of_it(
    encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio reported an error that was never retrieved, with all of its traceback, for every such caller."""
    gate, told = threading.Event(), list[dict[str, Any]]()

    def fails(self: Worker, *arguments: Any) -> None:
        gate.wait(30)
        raise ValueError("cut off")

    monkeypatch.setattr(Worker, "__init__", fails)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    with Scorer(encoder_dir, query_instruction="fails to load ") as scorer:
        calls = [asyncio.ensure_future(scorer.ascore("a", ["b"])) for _ in range(3)]
        while scorer._lease.engine is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        for call in calls[1:]:
            call.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        with pytest.raises(ValueError, match="cut off"):
            await calls[0]
    del calls, call
    await asyncio.sleep(0.05)
    gc.collect()
    assert told == []


class Passages(list[str]):
    """A list that one can tell to be gone."""


@pytest.mark.parametrize("ask", [Scorer.score, lambda *arguments: asyncio.run(Scorer.ascore(*arguments))])
def test_nothing_of_a_call_whose_load_failed_is_kept(ask: Callable[..., object], tmp_path: Path) -> None:
    """The scorer kept the model that had failed, that one its error, and the error the caller's frames."""
    scorer = Scorer(str(tmp_path))

    def failed() -> weakref.ref[Passages]:
        passages = Passages(["b"])
        with pytest.raises(ValueError, match=r"config\.json"):
            ask(scorer, "a", passages)
        return weakref.ref(passages)

    kept = failed()
    gc.collect()
    assert kept() is None


async def test_a_failed_load_that_is_noticed_late_does_not_take_the_model_of_the_next_one(
    encoder_dir: str, tmp_path: Path
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    model, gate = tmp_path / "model", threading.Event()
    model.mkdir()
    with Scorer(str(model)) as scorer, ThreadPoolExecutor(1) as other:
        late = asyncio.ensure_future(scorer.ascore("a", ["b"]))
        await asyncio.sleep(0)  # it has asked for the model
        held_up = asyncio.get_running_loop().run_in_executor(None, gate.wait, 30)
        with pytest.raises(ValueError, match=r"config\.json"):
            await asyncio.wrap_future(other.submit(scorer.score, "a", ["b"]))
        shutil.copytree(encoder_dir, model, dirs_exist_ok=True)
        await asyncio.wrap_future(other.submit(scorer.score, "a", ["b"]))
        gate.set()
        await held_up
        with pytest.raises(ValueError, match=r"config\.json"):
            await late
        assert scorer.stats()["pairs"] == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_copies_carry_settings_and_no_weights(encoder_dir: str, copier: object) -> None:
    with Scorer(encoder_dir, normalize=True) as scorer:
        scores = scorer.score("panda", PASSAGES)
        assert len(pickle.dumps(scorer)) < 3000
        with copier(scorer) as copied:  # type: ignore[operator]
            assert copied.settings == scorer.settings
            assert copied.score("panda", PASSAGES) == pytest.approx(scores)


def test_progress_is_shown_on_request_and_on_standard_error_only(
    encoder_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Scorer(encoder_dir, show_progress=True) as scorer:
        scorer.warmup()
        capfd.readouterr()
        scorer.score("panda", PASSAGES * 20)
        out, err = capfd.readouterr()
        assert len(list(scorer.score_stream(("panda", passage) for passage in PASSAGES * 20))) == 100
    out_of_stream, err_of_stream = capfd.readouterr()
    assert out == out_of_stream == ""
    assert "100/100" in err
    assert "100pair" in err_of_stream.replace(" ", "")  # nobody knows how many there will be


def test_exit_with_work_queued_is_silent_and_quick(encoder_dir: str) -> None:
    program = f"""
import threading, time
from bge_rerank_plugins import Scorer
scorer = Scorer({encoder_dir!r}, max_batch_tokens=512)
scorer.warmup()
threading.Thread(target=lambda: scorer.score("panda", ["panda " * 400] * 20000), daemon=True).start()
time.sleep(0.5)
print("leaving", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_scorer_that_is_dropped_just_before_exit_does_not_abort_the_process(encoder_dir: str) -> None:
    """Its worker once freed tensors while the interpreter went down: "terminate called without an active exception"."""
    program = f"""
from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import engine
def main():
    Scorer({encoder_dir!r}).score("a", ["b"])
main()
workers = [worker for each in engine.live for worker in each._workers]
import atexit
atexit._run_exitfuncs()
print([worker.is_alive() for worker in workers])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "True" not in done.stdout


@pytest.mark.parametrize(
    ("forks", "told"), [(False, "the scorer is closed"), (True, "forked after a model was loaded")]
)
def test_a_stream_that_goes_on_while_the_interpreter_exits_is_told(forks: bool, told: str, encoder_dir: str) -> None:
    """It waited for ever: that nobody is told then is for daemon threads, which end with the interpreter."""
    program = f"""
import atexit
import os
def goes_on():
    child = os.fork() if {forks} else 0
    if child:
        os.waitpid(child, 0)
        return
    try:
        list(stream)
    except RuntimeError as error:
        print(error, flush=True)
    if {forks}:
        os._exit(0)
atexit.register(goes_on)  # before the package's own, and called after it
from bge_rerank_plugins import Scorer
scorer = Scorer({encoder_dir!r})
stream = scorer.score_stream(("a", str(number)) for number in range(9000))
next(stream)
"""
    assert told in printed_by(program)


def test_a_forked_child_is_told_that_the_model_cannot_follow(encoder_dir: str) -> None:
    program = f"""
import os
import torch
from bge_rerank_plugins import Scorer
torch.set_num_threads(2)  # with one thread a child could load it anew
scorer = Scorer({encoder_dir!r})
scorer.warmup()
child = os.fork()
if child == 0:
    try:
        scorer.score("a", ["b"])
    except RuntimeError as error:
        print(error, flush=True)
    try:
        Scorer({encoder_dir!r}, normalize=True).score("a", ["b"])
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(len(scorer.score("a", ["b"])))
"""
    said = printed_by(program)
    assert said.count("forked after a model was loaded") == 2
    assert said.endswith("1\n")


@pytest.mark.parametrize("step", ["acquire", "Engine", "load"])
def test_a_child_that_was_forked_while_a_model_was_being_loaded_is_told(step: str, encoder_dir: str) -> None:
    """It waited for a lock of a thread that it has not: the scorer's own, and those of modules that were being imported."""
    module = "encoder.Encoder" if step == "load" else "registry"
    program = f"""
import os
import threading
import torch
from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import encoder, registry
torch.set_num_threads(1)  # with which a child may load it anew
held, done = threading.Event(), threading.Event()
whole = {module}.{step}
def slow(*arguments):
    held.set()
    done.wait()
    return whole(*arguments)
{module}.{step} = slow
scorer = Scorer({encoder_dir!r})
thread = threading.Thread(target=scorer.warmup)
thread.start()
held.wait()
while {step == "load"} and scorer._lease.engine is None:
    pass
child = os.fork()
if child == 0:
    for own in (scorer, Scorer({encoder_dir!r}, max_batch_tokens=779)):
        try:
            own.score("a", ["b"])
        except RuntimeError as error:
            print(error, flush=True)
        own.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
done.set()
thread.join()
print(len(scorer.score("a", ["b"])))
"""
    said = printed_by(program)
    assert said.count("this process was forked while a thread was loading the model") == 2
    assert said.endswith("1\n")


def test_a_scorer_may_be_closed_by_a_signals_handler_while_it_loads(
    encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler runs in the thread that loads, and waited for itself."""
    from bge_rerank_plugins.core import registry

    scorer = Scorer(encoder_dir, max_batch_tokens=778)
    acquire = registry.acquire

    def interrupted(settings: RerankSettings) -> object:
        scorer.close()
        return acquire(settings)

    monkeypatch.setattr(registry, "acquire", interrupted)
    with pytest.raises(RuntimeError, match="this Scorer is closed"):
        scorer.score("a", ["b"])
    assert not [key for key in registry._engines if '"max_batch_tokens":778' in key]


@pytest.mark.parametrize("layers", [5, "35", [5.0], [True], None])
def test_what_are_no_layers_is_refused(layers: object) -> None:
    with Scorer(str(DATA / "layerwise")) as scorer, pytest.raises(ValueError, match="cutoff_layer"):
        scorer.score_layers("a", ["b"], layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [5, "35", b"35", None])
def test_what_is_no_list_of_layers_is_refused_with_nothing_to_score(layers: object) -> None:
    with pytest.raises(ValueError, match=f"cutoff_layers={layers!r}: expected a list of layers"):
        Scorer("/no/such/model").score_layers("a", [], layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [["x"], [None], [5.0], [True]])
def test_what_is_no_layer_is_refused_with_nothing_to_score(layers: list[object]) -> None:
    with pytest.raises(ValueError, match=r"cutoff_layers=\[.*\]: expected whole numbers"):
        Scorer("/no/such/model").score_layers("a", [], layers)  # type: ignore[arg-type]


def test_layers_may_be_numpys_numbers() -> None:
    with Scorer(str(DATA / "layerwise")) as scorer:
        scores = scorer.score_layers("a", ["b"], np.array([3, 9]))  # type: ignore[arg-type]
        assert scores == scorer.score_layers("a", ["b"], [3, 9])
        assert [type(layer) for layer in scores] == [int, int]


def test_a_progress_bar_without_standard_error_is_none(encoder_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a service without a terminal: it cost the scores."""
    monkeypatch.setattr(sys, "stderr", None)
    with Scorer(encoder_dir, show_progress=True) as scorer:
        assert len(scorer.score("a", ["b"])) == 1


def test_layers_may_come_from_a_generator() -> None:
    """They were gone through twice, and nothing came back."""
    with Scorer(str(DATA / "layerwise")) as scorer:
        assert list(scorer.score_layers("a", ["b"], iter([3, 9]))) == [3, 9]  # type: ignore[arg-type]


def test_every_form_normalizes_and_cuts_as_score_and_rank_do() -> None:
    model, passages = str(DATA / "layerwise"), ["a", "a bear", "panda"]
    with Scorer(model) as raw, Scorer(model, normalize=True) as scorer:
        want = [sigmoid(score) for score in raw.score("panda", passages)]
        pairs = [("panda", passage) for passage in passages]
        for scores in (
            scorer.score("panda", passages),
            asyncio.run(scorer.ascore("panda", passages)),
            scorer.score_pairs(pairs),
            list(scorer.score_stream(pairs)),
            scorer.score_batch([("panda", passages)])[0],
            asyncio.run(scorer.ascore_batch([("panda", passages)]))[0],
            scorer.score_layers("panda", passages, [11])[11],
        ):
            assert scores == pytest.approx(want, abs=1e-6)
        middle = sorted(want)[1] - 1e-4
        ranked = scorer.rank("panda", passages, score_threshold=middle)
        assert len(ranked) == 2
        assert asyncio.run(scorer.arank("panda", passages, score_threshold=middle)) == ranked


def test_only_what_is_applied_to_scores_leaves_the_model_shared() -> None:
    other = {"model": "b", "device": "cpu", "dtype": "float32", "when_full": "error", "local_files_only": True}
    same = {"normalize": True, "show_progress": True, "long_passages": "split"}
    base = RerankSettings(model="a")
    for name, field in RerankSettings.model_fields.items():
        text = "x" if "str" in str(field.annotation) else 7
        changed = base.model_copy(update={name: {**other, **same}.get(name, text)})
        assert (key_of(changed) == key_of(base)) == (name in same), name


@pytest.mark.parametrize(
    ("form", "lock"),
    [
        ("score", "future"),
        ("score", "engine"),
        ("ascore", "future"),
        ("ascore", "engine"),
        ("ascore", "tokenizer"),
        ("stream", "future"),
        ("stream", "engine"),
        ("stats", "engine"),
    ],
)
def test_a_signals_handler_may_close_a_scorer_whose_thread_asks_it(
    form: str, lock: str, encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread held a lock, a worker needed that to end or held another one, and closing waited for the worker."""
    scorer = Scorer(encoder_dir, max_batch_tokens=782)
    engine, _ = scorer._lease.loaded()
    waited: list[threading.Thread] = []
    for worker in engine._workers:
        monkeypatch.setattr(worker, "join", lambda timeout: waited.append(threading.current_thread()))
    asked = engine.tokenizer_thread if lock == "tokenizer" else engine
    method = "stats" if form == "stats" else "submit"
    whole = getattr(asked, method)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if lock == "tokenizer":
            with engine.tokenizer_thread._shutdown_lock:
                scorer.close()
            return whole(*arguments, **options)
        result = whole(*arguments, **options)
        with result.future._condition if lock == "future" else engine._changed:
            time.sleep(0.05)  # until a worker comes to give the score
            scorer.close()
        return result

    monkeypatch.setattr(asked, method, interrupted)
    with suppress(RuntimeError):  # the pack may have been begun before
        if form == "score":
            scorer.score("a", ["b"])
        elif form == "ascore":
            asyncio.run(scorer.ascore("a", ["b"]))
        elif form == "stream":
            list(scorer.score_stream([("a", "b")]))
        else:
            scorer.stats()
    assert threading.current_thread() not in waited
    monkeypatch.undo()
    for worker in engine._workers:
        worker.join(timeout=30)
        assert not worker.is_alive()
