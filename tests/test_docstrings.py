"""The docstring corpus: what is read, in which order, and how it is cut into queries and passages."""

import builtins
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from bge_rerank_plugins.docstrings import Docstring, Pair, pairs, source_docstrings, split, standard_library

WRITE_DIGEST = """
import contextlib, hashlib, io, pathlib, runpy, sys
with contextlib.redirect_stdout(io.StringIO()) as corpus:
    runpy.run_module("bge_rerank_plugins.docstrings", run_name="__main__")
digest = hashlib.sha256(corpus.getvalue().encode()).hexdigest()
unwanted = {"antigravity", "this", "idlelib", "tkinter", "turtle", "test", "torch"}
imported = {name.partition(".")[0] for name in sys.modules} & unwanted
pathlib.Path(sys.argv[1]).write_text(f"{digest} {sorted(imported)}")
"""


@pytest.fixture(scope="module")
def corpus() -> list[Docstring]:
    return standard_library()


def text_of(corpus: list[Docstring], name: str) -> str:
    return next(docstring.text for docstring in corpus if docstring.name == name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("textwrap", "Text wrapping and filling."),  # a module
        ("pathlib.Path.mkdir", "Create a new directory"),  # a method
        ("os.listdir", "Return a list containing the names of the files"),  # in C, exported by another module
        ("builtins.str.join", "Concatenate any number of strings."),  # a method in C
        ("os.path.join", "Join two or more pathname components"),  # its module has another name on each platform
        ("math.gcd", "Greatest Common Divisor."),  # a function in C
        ("threading.Thread.daemon", "A boolean value"),  # a property
        ("email.mime.text.MIMEText", "Class for generating text/* type MIME documents."),  # nested
    ],
)
def test_the_standard_library_is_read_whatever_implements_it(corpus: list[Docstring], name: str, words: str) -> None:
    assert words in text_of(corpus, name)


def test_the_standard_library_gives_thousands_of_different_sorted_texts(corpus: list[Docstring]) -> None:
    assert 5000 < len(corpus) < 6500
    assert len({docstring.text for docstring in corpus}) == len(corpus)
    assert corpus == sorted(corpus)
    assert 1900 < len(pairs(corpus)) < 2400


def test_only_public_names_of_the_standard_library_are_read(corpus: list[Docstring]) -> None:
    tops = {docstring.name.partition(".")[0] for docstring in corpus}
    assert tops <= sys.stdlib_module_names
    assert [docstring.name for docstring in corpus if "._" in docstring.name] == []


def test_what_a_package_or_a_shell_does_to_the_standard_library_is_not_its_documentation(
    corpus: list[Docstring], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers adds methods to logging.Logger: three more once it was imported. Jupyter has its own input: 54 fewer."""

    def ours(*_: object) -> None:
        """Give a piece of advice that the standard library does not know of."""

    monkeypatch.setattr(logging.Logger, "advise", ours, raising=False)
    monkeypatch.setattr(builtins, "input", ours)
    assert standard_library() == corpus


def test_reading_the_standard_library_is_silent_and_the_same_in_every_process(tmp_path: Path) -> None:
    """With another hash seed each time, and every warning an error."""
    written = []
    for seed in ("1", "2"):
        report = tmp_path / seed
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", WRITE_DIGEST, str(report)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
        written.append(report.read_text())
    assert written[0] == written[1]
    assert written[0].endswith(" []")


@pytest.mark.parametrize(
    ("text", "query", "body"),
    [
        (
            "Wrap a single paragraph of text. Lines are at most width characters long, the last one may be shorter.",
            "Wrap a single paragraph of text.",
            "Lines are at most width characters long, the last one may be shorter.",
        ),
        (
            "Collapse and truncate the given\n    text\n\nThe text first has its whitespace collapsed, then it is cut to fit.",
            "Collapse and truncate the given text",
            "The text first has its whitespace collapsed, then it is cut to fit.",
        ),
        (
            "Use a version, e.g. 3.10, of the format. A version that is not known is an error, whatever the other options say.",
            "Use a version, e.g. 3.10, of the format.",
            "A version that is not known is an error, whatever the other options say.",
        ),
        (
            "S.find(sub[, start]) -> int\n\nReturn the lowest index where it is found.\n\n"
            "The arguments start and end are read as in slice notation; failure returns minus one.",
            "Return the lowest index where it is found.",
            "S.find(sub[, start]) -> int\nThe arguments start and end are read as in slice notation; failure returns minus one.",
        ),
        (
            "Names and values of things\n==========================\n\n"
            "What comes under the line of a heading is kept, while that line is not.",
            "Names and values of things",
            "What comes under the line of a heading is kept, while that line is not.",
        ),
    ],
    ids=["sentence", "paragraph", "abbreviation", "signature", "heading"],
)
def test_the_first_sentence_is_the_query_and_name_and_rest_the_passage(text: str, query: str, body: str) -> None:
    assert split(Docstring("module.name", text)) == Pair(query, f"module.name\n{body}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Return the names of all files.",
        "Return the names of all files. See above.",
        "Return names. They come in the order in which the system lists them, which may be any order at all.",
        ">>> print(one, two, three, four)\n\nThe words that follow an example do not make a question of the example itself.",
        f"{'word ' * 50}.\n\nThe words that follow would be enough, but nobody asks a question of fifty words in a search.",
    ],
    ids=["empty", "no rest", "short rest", "short query", "code", "endless query"],
)
def test_a_docstring_that_makes_no_question_and_answer_is_not_split(text: str) -> None:
    assert split(Docstring("module.name", text)) is None


def test_a_query_never_stands_in_its_own_passage(corpus: list[Docstring]) -> None:
    """Retrieval would be trivial otherwise; a few texts do repeat their first sentence, in another module's words."""
    found = pairs(corpus)
    assert sum(pair.query in pair.passage for pair in found) < 0.02 * len(found)


def test_queries_are_unique_so_that_each_has_one_relevant_passage() -> None:
    rest = "The words that follow are long enough to make a passage of this, and differ by number: "
    docstrings = [Docstring(f"module.name_{i}", f"Return all of the values. {rest}{i}") for i in range(3)]
    assert [pair.passage.partition("\n")[0] for pair in pairs(docstrings)] == ["module.name_0"]


def test_sources_are_read_without_importing_them(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\nraise RuntimeError("imported")\n')
    (package / "module.py").write_text(
        '''
def function():
    """A function."""
    def inner():
        """Nobody's business."""

def _private():
    """Private."""

class Class:
    """A class."""

    async def method(self):
        """A method.

        Indented.
        """

class Again:
    """A class."""
'''
    )
    (package / "broken.py").write_text("def (")
    (package / "test_module.py").write_text('"""A test."""')
    (package / "tests").mkdir()
    (package / "tests" / "helper.py").write_text('"""A helper of tests."""')
    assert source_docstrings(tmp_path) == [
        Docstring("package", "A package."),
        Docstring("package.module.Again", "A class."),
        Docstring("package.module.Class.method", "A method.\n\nIndented."),
        Docstring("package.module.function", "A function."),
    ]
