"""The training data: lines that are checked before anything is trained, and groups of passages drawn from them.

A group depends on nothing but the seed, the pass over the data and the line, so a run that is resumed draws what it would have
drawn. Knows nothing of tokens or models.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..jsonl import InputErrors, check_numbers, check_text, check_texts, read_all_lines

_LARGEST = float.fromhex("0x1.fffffep127")
"""The largest number that a tensor of scores can hold."""


@dataclass(frozen=True)
class Example:
    """One line.

    Attributes:
        place: File and number of the line, for messages.
        query: The query.
        pos: Passages that answer it.
        neg: Passages that do not.
        prompt: Question for the LLM rerankers, or None.
        pos_scores: A teacher's scores of `pos`, or None.
        neg_scores: A teacher's scores of `neg`, or None.
    """

    place: str
    query: str
    pos: list[str]
    neg: list[str]
    prompt: str | None = None
    pos_scores: list[float] | None = None
    neg_scores: list[float] | None = None


@dataclass(frozen=True)
class Group:
    """A query and passages that compete.

    Attributes:
        query: The query.
        passages: The positives first.
        positives: How many they are; one in training.
        prompt: Question for the LLM rerankers, or None.
        scores: A teacher's score of each passage, -inf for those drawn from other lines; None without a teacher.
    """

    query: str
    passages: list[str]
    positives: int = 1
    prompt: str | None = None
    scores: list[float] | None = None


def read_examples(path: str, *, scored: bool = False) -> list[Example]:
    """Reads and checks all lines.

    Args:
        path: The file.
        scored: Whether every line must have a teacher's scores.

    Raises:
        InputErrors: Every line that cannot be used, with its number and why; or no line at all.
        OSError: The file cannot be read.
    """

    def check(record: dict[str, Any]) -> None:
        check_example(record)
        if scored and record.get("pos_scores") is None:
            raise ValueError('no "pos_scores", which knowledge_distillation needs; `bge-rerank distill` writes them')

    with Path(path).open("rb") as source:
        lines = read_all_lines(source, path, check)
    return [example_of(line.record, line.place) for line in lines]


def read_both(data: str, eval_data: str, *, scored: bool) -> tuple[list[Example], list[Example]]:
    """Lines to train on and lines to measure on.

    Raises:
        InputErrors: As `read_examples`, of both files.
        OSError: A file cannot be read.
    """
    read: list[list[Example]] = []
    errors: list[str] = []
    for path, with_scores in ((data, scored), (eval_data, False)):
        try:
            read.append(read_examples(path, scored=with_scores))
        except InputErrors as error:  # noqa: PERF203 - of two files
            errors += error.messages
    if errors:
        raise InputErrors(errors)
    return read[0], read[1]


def example_of(record: dict[str, Any], place: str = "") -> Example:
    """A line's record, once it is checked."""
    optional = {name: record.get(name) for name in ("prompt", "pos_scores", "neg_scores")}
    return Example(place, record["query"], record["pos"], record["neg"], **optional)


def check_example(record: dict[str, Any]) -> None:
    """Raises ValueError for a record that cannot be trained on."""
    check_text(record, "query")
    if not record["query"].strip():
        raise ValueError('"query" is empty')
    for key in ("pos", "neg"):
        check_texts(record, key)
        if not all(text.strip() for text in record[key]):
            raise ValueError(f'"{key}" has an empty passage')
    if not record["pos"]:
        raise ValueError('"pos" is empty, expected a passage that answers the query')
    negatives = {same_text(text) for text in record["neg"]}
    for index, text in enumerate(record["pos"]):
        if same_text(text) in negatives:
            raise ValueError(f'"pos"[{index}] is in "neg" too')
    if record.get("prompt") is not None:
        check_text(record, "prompt")
    _check_scores(record)


def _check_scores(record: dict[str, Any]) -> None:
    keys = ("pos", "neg")
    given = [key for key in keys if record.get(f"{key}_scores") is not None]
    if len(given) == 1:
        raise ValueError(f'"{given[0]}_scores" without the scores of the other passages')
    for key in given:
        check_numbers(record, f"{key}_scores")
        for index, score in enumerate(record[f"{key}_scores"]):
            if abs(score) > _LARGEST:
                raise ValueError(f'"{key}_scores"[{index}] is beyond a 32-bit float')
        passages, scores = len(record[key]), len(record[f"{key}_scores"])
        if passages != scores:
            raise ValueError(f'"{key}_scores" has {scores} numbers for {passages} passages')


def same_text(text: str) -> str:
    """What two passages have in common that are the same but for case and white space."""
    return " ".join(text.split()).casefold()


def split_held_out(examples: list[Example], share: float, most: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Lines to train on and lines to measure MRR on, each in the order of the file; those of one query stay together.

    Queries are held out while they fit into that share of the lines and into `most` lines; where none does, the smallest one is,
    if it leaves at least half of the lines.
    """
    lines = Counter(same_text(example.query) for example in examples)
    count = min(most, len(examples) - 1, max(1, round(share * len(examples)))) if share else 0
    draw = random.Random(f"{seed} held out")
    first = dict.fromkeys(draw.sample(list(lines), min(count, len(lines))))
    rest = [query for query in lines if query not in first]
    draw.shuffle(rest)
    held_out: set[str] = set()
    held = 0
    for query in (*first, *rest):
        if held + lines[query] <= count:
            held_out.add(query)
            held += lines[query]
    smallest = min(lines, key=lines.__getitem__, default="")
    if count and not held_out and lines[smallest] <= min(most, len(examples) // 2):
        held_out = {smallest}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[same_text(example.query) in held_out].append(example)
    return parts


class Groups:
    """The groups of one pass over the data, by line; what torch calls a map-style dataset.

    Args:
        examples: The lines.
        size: Passages of a group.
        seed: Fixes what is drawn.
        scored: Whether groups have a teacher's scores.
        held_out: Lines that nothing is drawn from, but whose positives are no negatives of their queries.

    Attributes:
        epoch: Number of the pass, from 0; set before it begins.

    Raises:
        InputErrors: Lines for which too few negatives can be had.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: int,
        seed: int,
        *,
        scored: bool = False,
        held_out: Sequence[Example] = (),
    ) -> None:
        self._examples = examples
        self._size = size
        self._seed = seed
        self._scored = scored
        self._corpus = Corpus(examples, held_out)
        self.epoch = 0
        too_few = [error for example in examples if (error := self._corpus.lack(example, size - 1))]
        if too_few:
            raise InputErrors(too_few)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Group:
        example = self._examples[index]
        draw = random.Random(f"{self._seed} {self.epoch} {index}")
        positive = draw.randrange(len(example.pos))
        own = draw.sample(range(len(example.neg)), min(len(example.neg), self._size - 1))
        others = self._corpus.others(example, self._size - 1 - len(own), draw)
        scores = None
        if self._scored and example.pos_scores is not None and example.neg_scores is not None:
            negative_scores = [example.neg_scores[i] for i in own]
            scores = [example.pos_scores[positive], *negative_scores, *[float("-inf")] * len(others)]
        passages = [example.pos[positive], *(example.neg[i] for i in own), *others]
        return Group(example.query, passages, prompt=example.prompt, scores=scores)


def evaluation_groups(examples: Sequence[Example], corpus: Corpus, size: int, seed: int) -> list[Group]:
    """All positives and negatives of each line, with passages of the corpus up to `size` where they are fewer."""
    groups = []
    for index, example in enumerate(examples):
        missing = size - len(example.pos) - len(example.neg)
        others = corpus.others(example, max(0, missing), random.Random(f"{seed} evaluation {index}"))
        passages = [*example.pos, *example.neg, *others]
        groups.append(Group(example.query, passages, len(example.pos), example.prompt))
    return groups


class Corpus:
    """All passages of the data, to draw negatives from where a line has too few.

    Args:
        examples: The lines with these passages.
        others: Lines of which only the positives matter: they are no negatives of their queries.
    """

    def __init__(self, examples: Sequence[Example], others: Sequence[Example] = ()) -> None:
        texts: dict[str, str] = {}
        for example in examples:
            for text in (*example.pos, *example.neg):
                texts.setdefault(same_text(text), text)
        self._keys, self._texts = list(texts), list(texts.values())
        self._positives = positives_by_query([*examples, *others])

    def others(self, example: Example, count: int, draw: random.Random) -> list[str]:
        """So many passages that are neither the line's own nor positives of its query; fewer if there are no more."""
        if not count:
            return []
        taken = self._taken(example)
        # Most draws hit nothing of the line's own, so a few more than needed suffice in all but tiny corpora.
        few = min(len(self._keys), count + len(taken))
        found = draw.sample(range(len(self._keys)), few)
        return [self._texts[i] for i in found if self._keys[i] not in taken][:count]

    def lack(self, example: Example, count: int) -> str | None:
        """What to say of a line that has fewer negatives, the other lines' passages included; None if it has enough."""
        if len(example.neg) >= count:
            return None
        there = len(example.neg) + len(self._keys) - len(self._taken(example))
        if there >= count:
            return None
        cure = (
            f"take at most {there + 1}" if there else "give it one, or other lines to train on, besides those held out"
        )
        return (
            f"{example.place}: only {there} negatives, the passages of other lines included, for "
            f"train_group_size={count + 1}; {cure}"
        )

    def _taken(self, example: Example) -> set[str]:
        return {same_text(text) for text in (*example.pos, *example.neg)} | self._positives.get(
            same_text(example.query), set()
        )


def positives_by_query(examples: Sequence[Example]) -> dict[str, set[str]]:
    """What answers each query anywhere in the data, as `same_text` has both."""
    positives: dict[str, set[str]] = {}
    for example in examples:
        positives.setdefault(same_text(example.query), set()).update(map(same_text, example.pos))
    return positives
