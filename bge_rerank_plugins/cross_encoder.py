"""A scorer in the shape of sentence-transformers' `CrossEncoder`, for the tools that evaluate those.

`CrossEncoderRerankingEvaluator`, `CrossEncoderNanoBEIREvaluator` and mteb take it as it is. Knows nothing of torch before
tensors are asked for, and nothing of mteb before that asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .identity import asked_options, digest, local_files
from .ranking import check_cut, rank_scores
from .scorer import Scorer
from .settings import RerankSettings
from .texts import check_pairs, checked_texts, in_order

_NO_EXPERIMENT = ("model", "revision", "cutoff_layer", "max_batch_tokens")
"""Options that mteb hears of by the model's name and revision, and one that changes the time alone."""


class EvaluationResults:
    """Where evaluators put what they found: sentence-transformers writes it into a model card, here it can be read.

    Attributes:
        metrics: The metrics of the evaluators that ran, by their names.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float | str] = {}

    def set_evaluation_metrics(
        self, evaluator: object, metrics: dict[str, float | str], epoch: int = 0, step: int = 0
    ) -> None:
        """Keeps an evaluator's metrics."""
        self.metrics.update(metrics)


class ScorerCrossEncoder:
    """`predict` and `rank` as sentence-transformers' `CrossEncoder` has them, over a `Scorer`.

    Scores are the scorer's: raw logits, or 0 to 1 with `normalize`, where a `CrossEncoder` always applies its activation
    function; the order is the same. Prompts, batch sizes and devices are the scorer's options, so that those arguments are
    taken, as evaluators give them, and not followed.

    Args:
        scorer: Scores; stays the caller's to close.
    """

    num_labels = 1

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.model_card_data = EvaluationResults()

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
        *,
        inputs1: Iterable[dict[str, Any]] | None = None,
        inputs2: Iterable[dict[str, Any]] | None = None,
        task_metadata: object = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        prompt_type: object = None,
        precision: object = None,
    ) -> Any:
        """Scores pairs.

        Args:
            inputs: (query, passage) pairs, or one such pair.
            prompt_name: Not followed; see the options of the scorer. The same holds for all arguments that are not named here.
            prompt: Not followed.
            batch_size: Not followed.
            show_progress_bar: Not followed.
            activation_fn: Applied to the scores, a tensor of one dimension.
            apply_softmax: Not followed: one label has none.
            convert_to_numpy: An array; otherwise a list of tensors.
            convert_to_tensor: One tensor.
            device: Not followed.
            pool: Not followed.
            chunk_size: Not followed.
            inputs1: From mteb, in place of `inputs`: batches of queries, as dicts with "text".
            inputs2: From mteb: batches of passages, as many as queries.
            task_metadata: Not followed.
            hf_split: Not followed.
            hf_subset: Not followed.
            prompt_type: Not followed.
            precision: Not followed.

        Returns:
            float32, one per pair in their order; a single value for a single pair.

        Raises:
            ValueError: As `Scorer.score_pairs`; neither `inputs` nor both of `inputs1` and `inputs2`.
        """
        single = False
        if inputs is None:
            if inputs1 is None or inputs2 is None:
                raise ValueError("inputs=None: give pairs, or both inputs1 and inputs2")
            pairs = list(zip(_texts(inputs1), _texts(inputs2), strict=True))
        else:
            check_pairs(inputs)
            single = in_order(inputs) and len(inputs) == 2 and all(isinstance(text, str) for text in inputs)
            rows: Iterable[Any] = [inputs] if single else inputs
            # Rows of arrays are pairs as well. Strings and dicts are none, though tuples can be made of them.
            pairs = [tuple(row) if in_order(row) else row for row in rows]
        scores: Any = self.scorer.score_pairs(pairs)
        if activation_fn is not None or convert_to_tensor or not convert_to_numpy:
            import torch

            scores = torch.tensor(scores, dtype=torch.float32)
            if activation_fn is not None:
                scores = activation_fn(scores)
            if convert_to_tensor:
                return scores[0] if single else scores
            if not convert_to_numpy:
                return scores[0] if single else list(scores)
        import numpy as np

        array = np.asarray(scores, dtype=np.float32)
        return array[0] if single else array

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, int | float | str]]:
        """Orders documents by score, best first; equal scores keep the order of the input.

        Args:
            query: The question.
            documents: The texts to rank.
            top_k: How many to return; None for all.
            return_documents: Put the texts into the results.
            prompt_name: Not followed, as in `predict`. The same holds for the arguments that are not named here.
            prompt: Not followed.
            batch_size: Not followed.
            show_progress_bar: Not followed.
            activation_fn: As in `predict`.
            device: Not followed.
            pool: Not followed.
            chunk_size: Not followed.

        Returns:
            Dicts with "corpus_id", the place among the documents, "score", and "text" if asked for.
        """
        check_cut(top_k, None, "top_k")
        texts = checked_texts(query, documents)
        scores = self.predict([(query, text) for text in texts], activation_fn=activation_fn)
        return [
            {"corpus_id": found.index, "score": found.score}
            | ({"text": texts[found.index]} if return_documents else {})
            for found in rank_scores([float(score) for score in scores], top_k)
        ]

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb wants to know of a model: its name as organisation/name, its revision and that it is a cross-encoder.

        mteb keeps results by these. Options that are not the defaults and the files of a local checkpoint make results an
        experiment of their own in its cache; those of a hub model with the default options are under its plain name.

        Raises:
            ImportError: mteb is not installed, or one without experiments.
        """
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ImportError("this is for mteb, which is not installed: pip install mteb") from error
        if "experiment_kwargs" not in ModelMeta.model_fields:
            raise ImportError('this mteb does not tell runs with other options apart: pip install "mteb>=2.10"')

        settings = self.scorer.settings
        local = settings.model.count("/") != 1 or Path(settings.model).exists()
        name = f"local/{Path(settings.model).name}" if local else settings.model
        layer = "" if settings.cutoff_layer is None else f"-layer-{settings.cutoff_layer}"
        return ModelMeta.create_empty(
            overwrites={
                "name": name + layer,
                "revision": settings.revision or "main",
                "model_type": ["cross-encoder"],
                "framework": ["PyTorch"],
                "modalities": ["text"],
                "experiment_kwargs": _experiment(self.scorer) or None,
            }
        )


def _experiment(scorer: Scorer) -> dict[str, Any]:
    """What scores depend on besides the name and the revision, each with a value that mteb can name a folder by."""
    settings = scorer.settings
    values = {
        name: value
        for name, value in asked_options(settings).items()
        if name not in _NO_EXPERIMENT and value != RerankSettings.model_fields[name].default
    }
    if files := local_files(settings):
        values["files"] = [settings.model, files]
    if type(scorer) is not Scorer:  # it may score as it likes
        values["scorer"] = f"{type(scorer).__module__}.{type(scorer).__qualname__}"
    # mteb makes all of /, : and the like one letter, and some file systems take upper for lower case.
    plain = re.compile("[a-z0-9]{1,16}|True")
    return {name: value if plain.fullmatch(str(value)) else digest(value)[:12] for name, value in values.items()}


def _texts(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [text for batch in batches for text in batch["text"]]
