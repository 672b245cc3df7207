"""A cross-encoder as an ONNX graph in the published layout, checked against torch before it is left there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .docstrings import standard_library
from .onnx import GRAPH, OnnxScorer
from .scorer import Scorer
from .settings import RerankSettings

QUANTIZED = "onnx/model_quantized.onnx"
TOLERANCE = 1e-4
"""Largest difference between a score of the graph and torch's."""

LARGEST_FILE = 1_500_000_000
"""Bytes of weights beyond which they lie beside the graph: one file of ONNX holds 2 GB at most."""

_LOST = "there is something already, which would be lost"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Export(NamedTuple):
    """What was exported, and how well it agrees.

    Attributes:
        difference: Largest difference of a score from torch's, in float32.
        correlation: Rank correlation (Spearman) of the int8 graph's scores with torch's; None without one.
    """

    difference: float
    correlation: float | None


def export_onnx(settings: RerankSettings, directory: Path, *, int8: bool = False) -> Export:
    """Writes the graph, its config and its tokenizer.

    Args:
        settings: The model; a LoRA adapter is merged.
        directory: Where to; made if need be. One that is there and empty is filled, and is empty again if the export fails.
        int8: Whether to write an int8 graph, too (dynamic quantisation, weights of 7 bits with a scale per channel).

    Returns:
        How well the graphs agree with torch on docstrings of the standard library.

    Raises:
        ValueError: Not a cross-encoder, a directory that holds something, or scores that differ by more than `TOLERANCE`.
        ImportError: The extra `onnx-export` is not installed.
    """
    is_there = os.path.lexists(directory)
    if is_there and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: {_LOST}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Within a directory that is there, since it may be alone on its disk, or alone open to the user.
    with tempfile.TemporaryDirectory(dir=directory if is_there else directory.parent, prefix=".export-") as folder:
        made = Path(folder) / "model"
        (made / "onnx").mkdir(parents=True)
        with _quiet():
            _write(settings, made)
        export = _check(settings, made, int8=int8)
        if is_there:
            _move_into(directory, made)
        else:
            made.rename(directory)
    return export


def _move_into(directory: Path, made: Path) -> None:
    """Moves what was made, all of it or nothing, and over nothing that came there in the meantime."""
    moved: list[Path] = []
    try:
        for file in sorted(made.iterdir()):
            target = directory / file.name
            if os.path.lexists(target):
                raise ValueError(f"{target}: {_LOST}")
            moved.append(file.rename(target))
    except BaseException:
        for target in moved:
            target.rename(made / target.name)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and the quantiser remark on their own parts; process-wide."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _logits_of(model: Any, names: list[str]) -> Any:
    """A module that takes the inputs by place and gives the logits alone."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(**dict(zip(names, inputs, strict=True))).logits
            return logits

    return Logits().eval()


def _write(settings: RerankSettings, made: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('the export needs onnx: pip install "bge-rerank-plugins[onnx-export]"') from error
    import torch
    from transformers import AutoModelForSequenceClassification

    from .core.checkpoint import Checkpoint
    from .core.encoder import Encoder, checked_config
    from .core.families import family_of
    from .core.tokenizer import load_tokenizer
    from .core.weights import load_model

    checkpoint = Checkpoint.from_settings(settings)
    if family_of(checkpoint) is not Encoder:
        raise ValueError(f"model={settings.model!r}: only cross-encoders can be exported")
    config, layout, _ = checked_config(checkpoint, settings)
    cpu = torch.device("cpu")
    model = load_model(checkpoint, AutoModelForSequenceClassification, config, torch.float32, cpu, attention="eager")
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if layout.token_types else [])]
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    program: Any = torch.onnx.export(
        _logits_of(model, names),
        tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names),
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=(tuple({0: rows, 1: tokens} for _ in names),),
    )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    program.save(str(made / GRAPH), external_data=weights > LARGEST_FILE)
    config.architectures = [type(model).__name__]
    config.save_pretrained(made)
    for name in TOKENIZER_FILES:
        file = checkpoint.file(name)
        if file is not None:
            shutil.copy(file, made)
    if not (made / "tokenizer.json").exists():
        load_tokenizer(checkpoint).backend_tokenizer.save(str(made / "tokenizer.json"))


def _check(settings: RerankSettings, made: Path, *, int8: bool) -> Export:
    """Scores of the graphs beside torch's; a graph that differs is not left behind."""
    documents = [f"{docstring.name}: {docstring.text}" for docstring in standard_library()]
    passages = ["", *documents[:: max(1, len(documents) // 40)]]
    query = "read a file line by line"
    exact = settings.model_copy(
        update={"dtype": "float32", "device": "cpu", "normalize": False, "long_passages": "truncate"}
    )
    with Scorer.from_settings(exact) as scorer:
        want = scorer.score(query, passages)
    options: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("max_length", "query_max_length", "query_instruction", "passage_instruction")
    }
    with OnnxScorer(str(made), device="cpu", **options) as graph:
        difference = max(abs(a - b) for a, b in zip(want, graph.score(query, passages), strict=True))
    if difference > TOLERANCE:
        raise ValueError(f"the graph's scores differ from torch's by {difference:.1e}, more than {TOLERANCE}")
    if not int8:
        return Export(difference, None)
    with _quiet():
        _quantize(made)
    with OnnxScorer(str(made), file=QUANTIZED, device="cpu", **options) as graph:
        return Export(difference, _rank_correlation(want, graph.score(query, passages)))


def _quantize(made: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(made / GRAPH)
    del model.graph.value_info[:]  # shapes that the exporter noted, some of them no longer true; they are inferred anew
    # Weights of 7 bits: processors without VNNI add two products in 16 bits, and cut off what 8 bits would make of them.
    quantize_dynamic(model, made / QUANTIZED, per_channel=True, weight_type=QuantType.QInt8, reduce_range=True)


def _rank_correlation(left: list[float], right: list[float]) -> float:
    import numpy as np

    left_ranks, right_ranks = (np.argsort(np.argsort(scores)) for scores in (left, right))
    return float(np.corrcoef(left_ranks, right_ranks)[0, 1])
