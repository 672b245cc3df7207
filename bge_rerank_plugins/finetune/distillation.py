"""A teacher's scores for the training data, by any scorer of ours. Knows nothing of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.encoder import Encoder
from ..core.families import family_of
from ..core.prompt import PROMPT
from ..jsonl import InputError
from ..scorer import Scorer
from ..settings import RerankSettings

LINES_AT_ONCE = 64


def distill(records: Iterable[dict[str, Any]], teacher: Scorer) -> Iterator[dict[str, Any]]:
    """Adds a teacher's scores to lines of training data.

    Args:
        records: Lines as for `finetune`.
        teacher: Scores the passages; raw scores serve best, so leave `normalize` off.

    Yields:
        Copies of the lines with "pos_scores" and "neg_scores".

    Raises:
        InputError: A line has another "prompt" than the teacher.
    """
    remaining = iter(records)
    while part := list(itertools.islice(remaining, LINES_AT_ONCE)):
        check_prompts(part, teacher.settings)
        requests = [(record["query"], [*record["pos"], *record["neg"]]) for record in part]
        for record, scores in zip(part, teacher.score_batch(requests), strict=True):
            positives = len(record["pos"])
            yield {**record, "pos_scores": scores[:positives], "neg_scores": scores[positives:]}


def check_prompts(records: Iterable[dict[str, Any]], settings: RerankSettings) -> None:
    """Raises InputError for lines with another question than the teacher's, an LLM: it has one for all of them."""
    asked = PROMPT if settings.prompt is None else settings.prompt
    others = sorted({record["prompt"] for record in records if record.get("prompt")} - {asked})
    if others and family_of(Checkpoint.from_settings(settings)) is not Encoder:
        raise InputError(
            f"prompt={asked!r}: there are lines with the prompt {others[0]!r}; distil the lines of each prompt apart"
        )
