"""Who competes in `benchmark.py`, this package first: each a function from a checkpoint to `score(query, passages)`."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Score = Callable[[str, list[str]], list[float]]
Make = Callable[[Path, torch.dtype, str], Score]


class PeerMissing(Exception):
    """A peer cannot run here, and why."""


def _import(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerMissing(f"pip install {package}: {error}") from error


def _this_package(cutoff_layer: int | None = None, *, precision: str | None = None) -> Make:
    """This package in the run's precision, or in another one beside it."""

    def make(directory: Path, dtype: torch.dtype, device: str) -> Score:
        from bge_rerank_plugins import Scorer
        from bge_rerank_plugins.core.device import cpu_has_bfloat16

        name: Any = str(dtype).removeprefix("torch.")
        if precision == "int8" and device != "cpu":
            raise PeerMissing("int8 is for CPUs")
        if precision == name:
            raise PeerMissing(f"the whole run is in {name}")
        if precision == "bfloat16" and device == "cpu" and not cpu_has_bfloat16():
            raise PeerMissing("this processor has no bfloat16 arithmetic")
        return Scorer(str(directory), dtype=precision or name, device=device, cutoff_layer=cutoff_layer).score

    return make


def _cross_encoder(batch_size: int | None) -> Make:
    """sentence-transformers' CrossEncoder, with its defaults or with another batch size."""

    def make(directory: Path, dtype: torch.dtype, device: str) -> Score:
        library = _import("sentence_transformers", "sentence-transformers")
        model = library.CrossEncoder(str(directory), device=device, model_kwargs={"dtype": dtype})
        model.activation_fn = torch.nn.Identity()
        options = {} if batch_size is None else {"batch_size": batch_size}

        def score(query: str, passages: list[str]) -> list[float]:
            pairs = [(query, passage) for passage in passages]
            return [float(s) for s in model.predict(pairs, show_progress_bar=False, **options)]

        return score

    return make


def _model_card_encoder(directory: Path, dtype: torch.dtype, device: str) -> Score:
    """The transformers code of the model cards: one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).to(device).eval()

    def score(query: str, passages: list[str]) -> list[float]:
        pairs = [[query, passage] for passage in passages]
        with torch.no_grad():
            inputs = tokenizer(pairs, padding=True, truncation=True, return_tensors="pt", max_length=512).to(device)
            return list(model(**inputs, return_dict=True).logits.view(-1).float().tolist())

    return score


def _flag_embedding(batch_size: int | None) -> Make:
    """FlagEmbedding's FlagReranker, with its defaults or with another batch size."""

    def make(directory: Path, dtype: torch.dtype, device: str) -> Score:
        library = _import("FlagEmbedding", "FlagEmbedding")
        options = {} if batch_size is None else {"batch_size": batch_size}
        half = {"use_fp16": dtype == torch.float16, "use_bf16": dtype == torch.bfloat16}
        reranker = library.FlagReranker(str(directory), devices=[device], **half, **options)

        def score(query: str, passages: list[str]) -> list[float]:
            return [float(s) for s in reranker.compute_score([(query, passage) for passage in passages])]

        return score

    return make


def _exported(directory: Path) -> Path:
    """The checkpoint as a graph, with an int8 one beside it; made once."""
    from bge_rerank_plugins import RerankSettings
    from bge_rerank_plugins.export import export_onnx

    for name in ("onnxruntime", "onnx", "onnxscript"):
        _import(name, "'bge-rerank-plugins[onnx-export]'")
    if not (directory / "exported").exists():
        export_onnx(RerankSettings(model=str(directory)), directory / "exported", int8=True)
    return directory / "exported"


def _onnx_runtime(file: str) -> Make:
    """ONNX Runtime through `OnnxScorer`, in sorted batches."""

    def make(directory: Path, dtype: torch.dtype, device: str) -> Score:
        from bge_rerank_plugins.onnx import OnnxScorer

        runtime = _import("onnxruntime", "onnxruntime")
        if device != "cpu" and "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise PeerMissing("this ONNX Runtime is for CPUs")  # known before minutes go into graphs
        return OnnxScorer(str(_exported(directory)), file=file, device=device).score

    return make


def _card_inputs(tokenizer: Any, query: str, passages: list[str], device: str) -> dict[str, torch.Tensor]:
    """`get_inputs` of the LLM model cards: every pair tokenised on its own, padded on the left to a multiple of 8."""
    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
        "a prediction of either 'Yes' or 'No'."
    )

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tail = ids("\n") + ids(prompt)
    rows = []
    for passage in passages:
        first = [tokenizer.bos_token_id, *ids(f"A: {query}")[: 1024 * 3 // 4]]
        rows.append((first + ids("\n") + ids(f"B: {passage}"))[:1024] + tail)
    longest = -(-max(map(len, rows)) // 8) * 8
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _in_batches(batch_size: int, score: Score) -> Score:
    def batched(query: str, passages: list[str]) -> list[float]:
        batches = (passages[i : i + batch_size] for i in range(0, len(passages), batch_size))
        return [s for batch in batches for s in score(query, batch)]

    return batched


def _model_card_decoder(directory: Path, dtype: torch.dtype, device: str) -> Score:
    """The transformers code of the model card, in batches of 16: all 50 at once need tens of GB for the vocabulary."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]

    def score(query: str, passages: list[str]) -> list[float]:
        with torch.no_grad():
            inputs = _card_inputs(tokenizer, query, passages, device)
            return list(model(**inputs, return_dict=True).logits[:, -1, yes].float().tolist())

    return _in_batches(16, score)


def _model_card_layerwise(directory: Path, dtype: torch.dtype, device: str) -> Score:
    """The card's procedure, one padded batch, on transformers' Granite: the published class does not run on transformers 5."""
    from transformers import PreTrainedTokenizerFast

    from bge_rerank_plugins.core.layerwise import LayerwiseModel, granite_config

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
    published = json.loads((directory / "config.json").read_text())
    config = granite_config(published, published["num_hidden_layers"])
    model: Any = LayerwiseModel.from_pretrained(directory, config=config, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()

    def score(query: str, passages: list[str]) -> list[float]:
        with torch.no_grad():
            inputs = _card_inputs(tokenizer, query, passages, device)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            hidden = model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
            return list(model.lm_head[-1]["linear_head"](hidden)[:, -1, 0].float().tolist())

    return score


OURS = "this package"
CUTOFF = f"{OURS}, cutoff 28 of 40"
INT8 = f"{OURS}, int8"
BFLOAT16 = f"{OURS}, bfloat16"

CONTENDERS: dict[str, dict[str, Make]] = {
    "encoder": {
        OURS: _this_package(),
        INT8: _this_package(precision="int8"),
        BFLOAT16: _this_package(precision="bfloat16"),
        "CrossEncoder, defaults": _cross_encoder(None),
        "CrossEncoder, batches of 8": _cross_encoder(8),
        "FlagEmbedding, defaults": _flag_embedding(None),
        "FlagEmbedding, batches of 8": _flag_embedding(8),
        "transformers, as the model card": _model_card_encoder,
        "OnnxScorer, float32": _onnx_runtime("onnx/model.onnx"),
        "OnnxScorer, int8": _onnx_runtime("onnx/model_quantized.onnx"),
    },
    "decoder": {
        OURS: _this_package(),
        INT8: _this_package(precision="int8"),
        BFLOAT16: _this_package(precision="bfloat16"),
        "transformers, as the model card": _model_card_decoder,
    },
    "layerwise": {
        OURS: _this_package(),
        CUTOFF: _this_package(cutoff_layer=28),
        INT8: _this_package(precision="int8"),
        BFLOAT16: _this_package(precision="bfloat16"),
        "transformers, as the model card": _model_card_layerwise,
    },
}
