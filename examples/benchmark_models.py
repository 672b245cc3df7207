"""Random checkpoints of the three real architectures for `benchmark.py`, and what a token costs in each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bge_rerank_plugins.models import embedded_base

TOKENIZERS = Path(__file__).resolve().parent.parent / "tests" / "data"


@dataclass(frozen=True)
class Shape:
    """Size of a checkpoint."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = False

    def products(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many) of the matrix products of a layer."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, width, 1),
            (self.hidden, kv_width, 2),
            (width, self.hidden, 1),
            (self.hidden, self.intermediate, 2 if self.gated else 1),
            (self.intermediate, self.hidden, 1),
        ]

    def flop(self, rows: int, keys: int) -> float:
        """Floating-point operations in the layers for `rows` tokens that see `keys` tokens each on average.

        Embeddings and the one-row head cost nothing.
        """
        parameters = sum(inputs * outputs * count for inputs, outputs, count in self.products())
        return 2 * self.layers * rows * (parameters + 2 * keys * self.heads * self.head_dim)

    def necessary_flop(self, length: int, prefix: int) -> tuple[float, float]:
        """Operations of one sequence: of its first `prefix` tokens, which others may share, and of the rest."""
        if not self.gated:
            return 0.0, self.flop(length, length)
        return self.flop(prefix, prefix // 2), self.flop(length - prefix, (prefix + length) // 2)


@dataclass(frozen=True)
class FamilyModel:
    """Shapes of a family, and how a checkpoint of it is made."""

    shapes: dict[str, Shape]
    make: Callable[[Shape, Path, torch.dtype], None]
    tokenizer: Callable[[], Path]
    """Finds the tokenizer.json of its checkpoints."""


def make_checkpoint(
    family: str, shape: Shape, folder: Path, dtype: torch.dtype = torch.float32, tokenizer: Path | None = None
) -> Path:
    """A random checkpoint in `folder`, in the published layout, with the family's tokenizer or another one."""
    torch.manual_seed(0)
    FAMILIES[family].make(shape, folder, dtype)
    shutil.copy(tokenizer or FAMILIES[family].tokenizer(), folder / "tokenizer.json")
    return folder


def _encoder(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """XLM-RoBERTa, with the WordPiece tokenizer of MiniLM, so that real text has realistic lengths."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=513,  # 512 of them after the padding index
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.05,
    )
    XLMRobertaForSequenceClassification(config).to(dtype).save_pretrained(folder)
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 512,
    }
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | tokenizer))


def _decoder(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """Gemma, its real vocabulary size and head width."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        initializer_range=0.03,
    )
    GemmaForCausalLM(config).to(dtype).save_pretrained(folder)
    _copy_tokenizer_config("decoder", folder)


def _layerwise(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """MiniCPM with a head for every layer from 8, in the layout of the published checkpoint."""
    published: dict[str, Any] = json.loads((TOKENIZERS / "layerwise" / "config.json").read_text())
    published |= {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "start_layer": 8,
    }
    (folder / "config.json").write_text(json.dumps(published))
    kv_width = shape.kv_heads * shape.head_dim
    weights = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": (shape.hidden,),
            layer + "post_attention_layernorm.weight": (shape.hidden,),
            layer + "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            layer + "self_attn.k_proj.weight": (kv_width, shape.hidden),
            layer + "self_attn.v_proj.weight": (kv_width, shape.hidden),
            layer + "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            layer + "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            layer + "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            layer + "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    weights |= {f"lm_head.{i}.linear_head.weight": (1, shape.hidden) for i in range(shape.layers - 8 + 1)}
    tensors = {
        name: torch.ones(size, dtype=dtype) if len(size) == 1 else torch.randn(size, dtype=dtype) * 0.03
        for name, size in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _copy_tokenizer_config("layerwise", folder)


def _copy_tokenizer_config(family: str, folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZERS / family / name, folder)


FAMILIES = {
    "encoder": FamilyModel(
        {
            "bench": Shape(12, 768, 3072, 12, 12, 64, 30522),  # bge-reranker-base
            "full": Shape(24, 1024, 4096, 16, 16, 64, 30522),  # bge-reranker-large and -v2-m3
        },
        _encoder,
        lambda: embedded_base() / "tokenizer.json",
    ),
    "decoder": FamilyModel(
        {
            "bench": Shape(18, 512, 4096, 4, 1, 256, 256000, gated=True),  # all of gemma-2b but its width
            "full": Shape(18, 2048, 16384, 8, 1, 256, 256000, gated=True),  # gemma-2b
        },
        _decoder,
        lambda: TOKENIZERS / "decoder" / "tokenizer.json",
    ),
    "layerwise": FamilyModel(
        {
            "bench": Shape(40, 768, 1920, 12, 12, 64, 122753, gated=True),  # all of MiniCPM-2B but its width
            "full": Shape(40, 2304, 5760, 36, 36, 64, 122753, gated=True),  # MiniCPM-2B
        },
        _layerwise,
        lambda: TOKENIZERS / "layerwise" / "tokenizer.json",
    ),
}
