"""The documentation of this Python's standard library as a judged set: real text that every installation holds."""

from __future__ import annotations

from ..docstrings import pairs, standard_library
from .inputs import JudgedSet
from .settings import STANDARD_LIBRARY


def standard_library_set() -> JudgedSet:
    """First sentences of docstrings as queries; the name and the rest of each is the one relevant passage."""
    found = pairs(standard_library())
    names = [pair.passage.partition("\n")[0] for pair in found]
    return JudgedSet(
        name=STANDARD_LIBRARY,
        queries={f"q:{name}": pair.query for name, pair in zip(names, found, strict=True)},
        passages={name: pair.passage for name, pair in zip(names, found, strict=True)},
        qrels={f"q:{name}": {name: 1} for name in names},
    )
