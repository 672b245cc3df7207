"""The demo: real text, BM25, both adapters, and what it prints."""

import io
import sys
from pathlib import Path

import pytest
from test_cli import process

from bge_rerank_plugins.cli import main
from bge_rerank_plugins.demo import FRAMEWORKS, PUBLISHED_MODEL, QUERIES, Index
from bge_rerank_plugins.docstrings import Docstring

ENCODER = str(Path(__file__).parent / "data" / "encoder")
QUERY = "shorten a text so that it fits into a given width"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the demo as if in a pipe of 80 columns; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: str) -> str:
        assert main(["demo", *argv]) == 0
        return capsys.readouterr().out

    return run


def rows(printed: str) -> list[list[str]]:
    """The cells of the rankings that were printed."""
    return [line.split() for line in printed.splitlines() if line[:2].strip().isdigit()]


def test_it_fits_80_columns_with_no_colours_in_a_pipe(demo) -> None:
    printed = demo("--model", ENCODER, "--query", "handle a single HTTP request", "--top-n", "30")

    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert "\x1b" not in printed
    assert "…" not in printed, "a column is too narrow for what it holds"
    assert "..handle_one_request" in printed, "the end of a name tells more than its beginning"


def test_a_narrow_terminal_gets_the_reranked_side_whole(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    printed = demo("--model", ENCODER, "--query", "handle a single HTTP request", "--top-n", "3")

    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 40
    assert "…" not in printed, "a column is too narrow for what it holds"
    for rank, (place, _, score, was) in enumerate(rows(printed), start=1):
        assert (int(place), float(score) < 0, int(was) > 0) == (rank, True, True)


def test_it_shows_both_rankings_best_first_and_where_each_was(demo) -> None:
    ranking = rows(demo("--model", ENCODER, "--query", QUERY, "--candidates", "20", "--top-n", "7"))

    assert [row[0] for row in ranking] == [str(rank) for rank in range(1, 8)]
    assert ranking[0][1] == "textwrap.shorten"
    for column in (2, 4):
        scores = [float(row[column]) for row in ranking]
        assert scores == sorted(scores, reverse=True)
    places = {int(row[5]): row[3] for row in ranking}
    assert max(places) <= 20
    before = {rank: row[1] for rank, row in enumerate(ranking, start=1)}
    assert all(before[place] == name for place, name in places.items() if place in before)


def test_both_frameworks_give_the_same_ranking(demo) -> None:
    rankings = [rows(demo("--model", ENCODER, "--query", QUERY, "--framework", name)) for name in FRAMEWORKS]

    assert len(rankings) == 2
    assert rankings[0] == rankings[1]
    assert len(rankings[0]) == 10


def test_it_tells_the_times_and_the_best_answer(demo) -> None:
    printed = " ".join(demo("--model", ENCODER, "--query", QUERY).split())

    for part in (
        "docstrings, read in ",
        "indexed for BM25 in ",
        "loaded in ",
        "BM25 found 50 in ",
        "reranked in ",
        "Best: ",
    ):
        assert part in printed


def test_a_query_that_nothing_matches_is_said_to_be_one(demo) -> None:
    assert "BM25 found nothing" in demo("--model", ENCODER, "--query", "zzqqx")
    assert "BM25 found nothing" in demo("--model", ENCODER, "--query", "")


def test_a_terminal_without_our_characters_gets_what_it_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)

    assert main(["demo", "--model", ENCODER, "--query", "shorten a naïve text – briefly"]) == 0


@pytest.mark.parametrize(
    ("module", "framework"),
    [("bm25s", "langchain"), ("rich.console", "langchain"), ("langchain_core.documents", "langchain")],
)
def test_a_missing_extra_names_its_cure(
    module: str, framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert main(["demo", "--model", ENCODER, "--query", QUERY, "--framework", framework]) == 2
    assert 'pip install "bge-rerank-plugins[demo]"' in capsys.readouterr().err


def test_the_missing_second_framework_names_its_extra_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_index.core.schema", None)

    assert main(["demo", "--model", ENCODER, "--query", QUERY, "--framework", "llama-index"]) == 2
    assert 'pip install "bge-rerank-plugins[demo,llama-index]"' in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--candidates", "--top-n"])
def test_less_than_one_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", ENCODER, flag, "0"]) == 2
    assert f"{flag}=0: expected a whole number from 1" in capsys.readouterr().err


def test_bm25_finds_what_shares_words_with_the_query() -> None:
    index = Index(
        [Docstring("a.cat", "Feed the cat."), Docstring("a.dog", "Walk the dog."), Docstring("b", "Nothing.")]
    )

    found = index.search("the dog", limit=50)

    assert [candidate.docstring.name for candidate in found] == ["a.dog"]
    assert (found[0].place, found[0].text) == (0, "a.dog\nWalk the dog.")


ANSWERS = {
    "make a temporary directory that is deleted when I am done": {"tempfile.TemporaryDirectory"},
    "list the files in a folder": {"os.listdir", "os.scandir", "pathlib.Path.iterdir"},
    "compare two directories": {"filecmp", "filecmp.dircmp"},
    "parse a string into a datetime object": {"datetime.datetime.strptime", "datetime.datetime.fromisoformat"},
}


def test_the_embedded_model_puts_the_answers_higher_than_bm25_did(demo) -> None:
    printed = demo()

    searches = printed.split("Query: ")[1:]
    assert [search.splitlines()[0] for search in searches] == list(QUERIES) == list(ANSWERS)
    before, after = 0.0, 0.0
    for search, answers in zip(searches, ANSWERS.values(), strict=True):
        ranking = rows(search)
        before += max((1 / int(row[0]) for row in ranking if row[1] in answers), default=0)
        after += max((1 / int(row[0]) for row in ranking if row[3] in answers), default=0)
    assert after > before + 0.5


def test_a_reader_that_has_seen_enough_ends_it_silently() -> None:
    with process("demo", "--model", ENCODER) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert (running.wait(), running.stderr.read()) == (141, b"")


def test_the_embedded_model_is_said_to_be_for_demos(demo) -> None:
    cure = f"bge-rerank demo --model {PUBLISHED_MODEL}"

    assert demo("--query", QUERY).rstrip().endswith(cure)
    assert cure not in demo("--query", QUERY, "--model", ENCODER)
