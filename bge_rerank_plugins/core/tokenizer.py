"""A checkpoint's tokenizer exactly as published, and what its texts begin with. Knows nothing of prompts or weights."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .words import check_agreement

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

# Without one of these, transformers makes up an empty tokenizer in silence.
_VOCABULARIES = ("sentencepiece.bpe.model", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")

_OF_LLAMAS_BUILD = ("llama", "mistral")
"""Models whose SentencePiece file transformers 5 reads without the space before a text, unless a class is named."""

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer as published, with its truncation and padding switched off once, before anyone shares it.

    tokenizer.json is taken as it stands: the classes that transformers 5 picks by model type rebuild parts of the
    pipeline themselves, and the model cards' scores were made with the file's.

    Raises:
        ValueError: There is none, it cannot be loaded, is no fast one, or its files disagree.
        ImportError: It is SentencePiece's, and what reads that is not installed.
    """
    for name in _BESIDE:  # transformers takes one that the hub fails to give for one that is not there
        checkpoint.file(name)
    kind: Any = (
        PreTrainedTokenizerFast if checkpoint.file("tokenizer.json") is not None else _reads_vocabulary(checkpoint)
    )
    try:
        tokenizer = kind.from_pretrained(checkpoint.model, trust_remote_code=False, **checkpoint.hub_options())
    except Exception as error:  # what the Rust tokenizer raises has no type of its own
        raise ValueError(f"model={checkpoint.model!r}: its tokenizer cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"model={checkpoint.model!r}: its tokenizer is no fast tokenizer; add a tokenizer.json")
    backend: Tokenizer = tokenizer.backend_tokenizer
    check_agreement(checkpoint.model, tokenizer.init_kwargs, backend)
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def first_tokens(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """Ids of what a language model's texts begin with: its first token, if it has one that it does not pad with.

    Where there is none, FlagEmbedding begins with the text, too.

    Raises:
        ValueError: The class that is named puts one there, and special_tokens_map.json does not say so, too; or nothing is said.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = _bos_elsewhere(checkpoint, tokenizer)
    return [] if bos in (None, tokenizer.pad_token_id) else [int(bos)]


def _reads_vocabulary(checkpoint: Checkpoint) -> Any:
    """The class of transformers that makes a tokenizer of a vocabulary."""
    vocabulary = next((name for name in _VOCABULARIES if checkpoint.file(name) is not None), None)
    if vocabulary is None:
        raise ValueError(f"model={checkpoint.model!r}: it has no tokenizer.json, nor any of {', '.join(_VOCABULARIES)}")
    if vocabulary.endswith(".model") and not all(map(_is_installed, ("sentencepiece", "google", "google.protobuf"))):
        raise ImportError(
            f"model={checkpoint.model!r}: it has no tokenizer.json, and reading its {vocabulary} needs two packages more: "
            "pip install sentencepiece protobuf"
        )
    # transformers 5 takes another than is named for some models, which makes other tokens of the same file.
    named = _named_class(checkpoint)
    if named is None and vocabulary == "tokenizer.model" and checkpoint.config.get("model_type") in _OF_LLAMAS_BUILD:
        return LlamaTokenizer
    return named or AutoTokenizer


def _named_class(checkpoint: Checkpoint) -> type | None:
    """The class of transformers that tokenizer_config.json names, or None if that has no such one."""
    kind = getattr(transformers, str(checkpoint.tokenizer_config.get("tokenizer_class")).removesuffix("Fast"), None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase) else None


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _bos_elsewhere(checkpoint: Checkpoint, tokenizer: Any) -> int | None:
    """Id of the first token where the tokenizer seems to have none, since tokenizer.json is read without its own class."""
    if "bos_token" in checkpoint.tokenizer_config:
        return None
    if not checkpoint.tokenizer_config:
        raise ValueError(
            f"model={checkpoint.model!r}: it has no tokenizer_config.json, which says what a text begins with"
        )
    kind = _named_class(checkpoint)
    default = None if kind is None else inspect.signature(kind).parameters.get("bos_token")
    if kind is None or default is None or default.default is None:
        return None
    file = checkpoint.file("special_tokens_map.json")
    token = None if file is None else json.loads(file.read_text(encoding="utf-8")).get("bos_token")
    if default.default == (token.get("content") if isinstance(token, dict) else token):
        return int(tokenizer.convert_tokens_to_ids(default.default))
    raise ValueError(
        f"model={checkpoint.model!r}: its tokenizer_config.json names no bos_token, and that of {kind.__name__} "
        f"is {default.default!r} where nothing is said; name it there, or null"
    )
