"""A teacher's scores for the training data, by any scorer of ours. Knows nothing of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.encoder import Encoder
from ..core.families import family_of
from ..core.prompt import PROMPT
from ..core.sequences import PairError
from ..jsonl import InputError
from ..scorer import Scorer
from ..settings import RerankSettings

LINES_AT_ONCE = 64

KEYS = ("pos", "neg")


def distill(records: Iterable[dict[str, Any]], teacher: Scorer) -> Iterator[dict[str, Any]]:
    """Adds a teacher's scores to lines of training data.

    Args:
        records: Lines as for `finetune`.
        teacher: Scores the passages; raw scores serve best, so leave `normalize` off.

    Yields:
        Copies of the lines with "pos_scores" and "neg_scores".

    Raises:
        InputError: A line has another "prompt" than the teacher, or a passage that cannot be scored.
    """
    remaining = iter(records)
    while part := list(itertools.islice(remaining, LINES_AT_ONCE)):
        check_prompts(part, teacher.settings)
        pairs = [(record["query"], text) for record in part for key in KEYS for text in record[key]]
        try:
            scores = iter(teacher.score_pairs(pairs))
        except PairError as error:
            if error.index >= len(pairs):  # of a teacher that makes other pairs of these
                raise
            raise _of_its_line(error, part) from error
        for record in part:
            yield {**record, **{f"{key}_scores": [next(scores) for _ in record[key]] for key in KEYS}}


def _of_its_line(error: PairError, records: Iterable[dict[str, Any]]) -> InputError:
    """What to say of a pair that cannot be scored, by its query and its place on the line."""
    places = [(record["query"], key, index) for record in records for key in KEYS for index in range(len(record[key]))]
    query, key, index = places[error.index]
    return InputError(f'the line with the query {query!r:.80}: "{key}"[{index}]: {error.why}')


def check_prompts(records: Iterable[dict[str, Any]], settings: RerankSettings) -> None:
    """Raises InputError for lines with another question than the teacher's, an LLM: it has one for all of them."""
    asked = PROMPT if settings.prompt is None else settings.prompt
    others = sorted({record["prompt"] for record in records if record.get("prompt")} - {asked})
    if others and family_of(Checkpoint.from_settings(settings)) is not Encoder:
        raise InputError(
            f"prompt={asked!r}: there are lines with the prompt {others[0]!r}; distil the lines of each prompt apart"
        )
