"""A separable toy task for tests of fine-tuning: a passage answers a query if it speaks of the same animal."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANIMALS = ("panda", "bear", "tiger", "China")
FILLING = ("the", "species", "of", "a", "is", "giant", "what", "endemic")


def toy_lines(count: int, seed: int, *, always: str | None = None) -> list[dict[str, Any]]:
    """Queries that name an animal among other words, a passage that names it too, three that name the others.

    To relate two texts a network needs attention, which a cross-encoder of random weights is slow to learn; with `always` the
    right passage is the one that names that animal, whatever the query.
    """
    draw = random.Random(seed)

    def text(animal: str) -> str:
        words = draw.sample(FILLING, 2)
        words.insert(draw.randrange(3), animal)
        return " ".join(words)

    lines = []
    for _ in range(count):
        animal = always or draw.choice(ANIMALS)
        others = [other for other in ANIMALS if other != animal]
        lines.append({"query": text(animal), "pos": [text(animal)], "neg": [text(other) for other in others]})
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> str:
    """Writes JSON lines and returns the path."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def accuracy(scorer: Any, lines: Sequence[dict[str, Any]]) -> float:
    """Share of the lines whose positive is ranked first."""
    first = [scorer.rank(line["query"], [*line["pos"], *line["neg"]], top_n=1)[0].index for line in lines]
    return first.count(0) / len(first)
