"""A teacher's scores for the training data, by any scorer of ours. Knows nothing of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ..scorer import Scorer

LINES_AT_ONCE = 64


def distill(records: Iterable[dict[str, Any]], teacher: Scorer) -> Iterator[dict[str, Any]]:
    """Adds a teacher's scores to lines of training data.

    Args:
        records: Lines as for `finetune`.
        teacher: Scores the passages; raw scores serve best, so leave `normalize` off.

    Yields:
        Copies of the lines with "pos_scores" and "neg_scores".
    """
    remaining = iter(records)
    while part := list(itertools.islice(remaining, LINES_AT_ONCE)):
        requests = [(record["query"], [*record["pos"], *record["neg"]]) for record in part]
        for record, scores in zip(part, teacher.score_batch(requests), strict=True):
            positives = len(record["pos"])
            yield {**record, "pos_scores": scores[:positives], "neg_scores": scores[positives:]}
