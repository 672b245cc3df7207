"""Docstrings as a corpus of real text: the reader's own standard library, or any folder of Python sources.

The demo searches the first, the embedded models were trained on the second, and both are cut into queries and passages in the
same way. Pure standard library: knows nothing of models, scoring or retrieval.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_QUERY_WORDS = 4
MAX_QUERY_WORDS = 40
MIN_PASSAGE_WORDS = 10

# Modules whose import a user would notice, or that add nothing.
_SKIPPED_MODULES = frozenset(
    {
        *("antigravity", "this"),  # open a browser, print
        *("idlelib", "tkinter", "turtle", "turtledemo"),  # need a display
        *("readline", "rlcompleter"),  # change the terminal
        *("crypt", "imp", "lib2to3", "sre_compile", "sre_constants", "sre_parse"),  # deprecated as a whole
        *("distutils", "ensurepip"),  # replaced by installed packages, or bundle them
        *("genericpath", "nt", "ntpath", "posix", "posixpath"),  # documented as os and os.path
        *("msilib", "pydoc_data", "test", "xxlimited", "xxlimited_35", "xxsubtype"),  # not for programs
    }
)
_SKIPPED_PARTS = frozenset({"test", "tests", "testing", "conftest"})
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "cf.", "resp.", "approx.")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)\s*(->.*|:)?$")
_RULE = re.compile(r"[^\w\s]{3,}$")
_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True, order=True)
class Docstring:
    """The documentation of one module, class, function, method or property.

    Attributes:
        name: The qualified name, such as `textwrap.shorten`.
        text: The docstring, its indentation removed.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A query and the passage that answers it.

    Attributes:
        query: The first sentence of a docstring.
        passage: The qualified name, and all of the docstring but its first sentence.
    """

    query: str
    passage: str


def standard_library() -> list[Docstring]:
    """Read the documentation of this interpreter's standard library, C-implemented objects included.

    A process of its own imports the public modules, all but those whose import a user would notice: in the
    caller's process, a shell or a package may have put objects of its own in the place of some. Nothing is
    printed, warned about or read from the network.

    Returns:
        About 5,500 docstrings, each text once, sorted by name: the same list in every process.
    """
    reader = subprocess.run([sys.executable, "-I", __file__], stdout=subprocess.PIPE, check=True)
    return [Docstring(name, text) for name, text in json.loads(reader.stdout)]


def source_docstrings(folder: Path) -> list[Docstring]:
    """Read the docstrings of all Python sources under a folder, without importing any of them.

    Args:
        folder: A folder of packages and modules, such as `site-packages`. Tests are left out, and so are
            files that this interpreter cannot parse.

    Returns:
        The docstrings of public objects, each text once, sorted by name.
    """
    return _unique(found for path in sorted(folder.rglob("*.py")) for found in _source_file(path, folder))


def split(docstring: Docstring) -> Pair | None:
    """Cut a docstring into a query, its first sentence, and a passage, its name and the rest.

    Signatures that C-implemented functions begin with are no sentence, so they stay in the passage.

    Returns:
        None where this makes no question and answer: the query is code or not of `MIN_QUERY_WORDS` to
        `MAX_QUERY_WORDS` words, or fewer than `MIN_PASSAGE_WORDS` words follow it.
    """
    lines = [line for line in docstring.text.splitlines() if not _RULE.match(line.strip())]
    signatures = _leading_signatures(lines)
    query, rest = _first_sentence("\n".join(lines[len(signatures) :]).strip())
    body = "\n".join([*signatures, rest]).strip()
    is_question = MIN_QUERY_WORDS <= len(_WORD.findall(query)) <= MAX_QUERY_WORDS and ">>>" not in query
    if not is_question or len(_WORD.findall(body)) < MIN_PASSAGE_WORDS:
        return None
    return Pair(query, f"{docstring.name}\n{body}")


def pairs(docstrings: Iterable[Docstring]) -> list[Pair]:
    """Split every docstring that is long enough, keeping the first of those that share a query."""
    by_query: dict[str, Pair] = {}
    for docstring in docstrings:
        pair = split(docstring)
        if pair is not None:
            by_query.setdefault(pair.query.lower(), pair)
    return list(by_query.values())


def _unique(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """Sort by name, and keep each text under its first name only."""
    by_text: dict[str, Docstring] = {}
    for docstring in sorted(docstrings):
        by_text.setdefault(docstring.text, docstring)
    return list(by_text.values())


def _leading_signatures(lines: list[str]) -> list[str]:
    count = 0
    while count < len(lines) and _SIGNATURE.match(lines[count].strip()):
        count += 1
    return lines[:count]


def _first_sentence(text: str) -> tuple[str, str]:
    """Split at the first full stop of the first paragraph, or at the end of that paragraph."""
    paragraph, _, following = text.partition("\n\n")
    for end in (match.end() for match in _SENTENCE_END.finditer(paragraph)):
        if not paragraph[:end].lower().endswith(_ABBREVIATIONS):
            return " ".join(paragraph[:end].split()), f"{paragraph[end:].strip()}\n\n{following}".strip()
    return " ".join(paragraph.split()), following.strip()


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _standard_modules() -> Iterator[tuple[str, types.ModuleType]]:
    """Import the public modules of the standard library, in the order of their names."""
    for name in sorted({"os.path", *sys.stdlib_module_names} - _SKIPPED_MODULES):
        if _is_public(name):
            yield from _with_submodules(name)


def _with_submodules(name: str) -> Iterator[tuple[str, types.ModuleType]]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # made for another platform, or left out of this build of Python
        return
    yield name, module
    # The submodules of encodings are one codec each and document nothing.
    if name == "encodings":
        return
    for found in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda found: found.name):
        if _is_public(found.name) and found.name not in _SKIPPED_PARTS:
            yield from _with_submodules(f"{name}.{found.name}")


def _module_docstrings(module_name: str, module: types.ModuleType) -> Iterator[Docstring]:
    yield from _docstring(module_name, module)
    exported = getattr(module, "__all__", ())
    for name, value in sorted(vars(module).items()):
        if not _is_public(name) or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        # What a C accelerator implements names that module, not the public one that exports it.
        if getattr(value, "__module__", None) == module.__name__ or name in exported:
            yield from _object_docstrings(f"{module_name}.{name}", value)


def _object_docstrings(name: str, value: object) -> Iterator[Docstring]:
    yield from _docstring(name, value)
    if not isinstance(value, type):
        return
    for member_name, member in sorted(vars(value).items()):
        if not _is_public(member_name):
            continue
        if inspect.isclass(member) and member.__qualname__ == f"{value.__qualname__}.{member_name}":
            yield from _object_docstrings(f"{name}.{member_name}", member)
        elif inspect.isroutine(member) or inspect.isdatadescriptor(member):
            yield from _docstring(f"{name}.{member_name}", member)


def _docstring(name: str, value: object) -> Iterator[Docstring]:
    text = value.__doc__
    if isinstance(text, str) and text.strip():
        yield Docstring(name, inspect.cleandoc(text))


def _source_file(path: Path, folder: Path) -> Iterator[Docstring]:
    parts = path.relative_to(folder).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if not parts or _SKIPPED_PARTS.intersection(parts) or parts[-1].startswith("test_"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _node_docstrings(".".join(parts), tree)


def _node_docstrings(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[Docstring]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield Docstring(name, text)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_public(child.name):
            yield from _node_docstrings(f"{name}.{child.name}", child)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = (docstring for name, module in _standard_modules() for docstring in _module_docstrings(name, module))
    json.dump([(docstring.name, docstring.text) for docstring in _unique(found)], sys.stdout)
