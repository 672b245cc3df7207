"""Shared fixtures: the oracle's checkpoints, and tiny checkpoints of real architectures made on the spot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tiny products on shared cores: spinning threads cost seconds

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerFast

settings.register_profile(
    "ci", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("ci")

DATA = Path(__file__).parent / "data"
LANGSMITHS_WARNING = "ignore:'asyncio.iscoroutinefunction' is deprecated:DeprecationWarning"
"""What its import says from Python 3.14 on."""

ORACLE: dict[str, Any] = json.loads((DATA / "oracle.json").read_text(encoding="utf-8"))


def oracle_cases(family: str) -> list[Any]:
    """Cases of a family as pytest parameters, named by max_length."""
    return [
        pytest.param(case, id=f"{family}-{case['max_length']}") for case in ORACLE["cases"] if case["family"] == family
    ]


def printed_by(program: str) -> str:
    """What a program prints that forks, or could wait for ever, and ends well."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_a_token_more(model: str | Path, folder: Path) -> Path:
    """A copy whose tokenizer knows "<weird>", which has no row among the weights."""
    shutil.copytree(model, folder)
    said = json.loads((folder / "tokenizer.json").read_text())
    said["added_tokens"].append(said["added_tokens"][0] | {"id": 1502, "content": "<weird>"})
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="session")
def oracle_pairs() -> list[tuple[str, str]]:
    return [(query, passage) for query, passage in ORACLE["pairs"]]


@pytest.fixture(scope="session")
def encoder_dir() -> str:
    return str(DATA / "encoder")


@pytest.fixture(scope="session")
def classifier_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny checkpoint with wide weights for every architecture of the encoder family, each with a fitting tokenizer."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
    )

    shape = {
        "vocab_size": 1500,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 1,
        "initializer_range": 0.5,
    }
    roberta = {"max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    models = {
        "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig(**shape, **roberta, type_vocab_size=1)),
        "roberta": (RobertaForSequenceClassification, RobertaConfig(**shape, **roberta, type_vocab_size=1)),
        "bert": (BertForSequenceClassification, BertConfig(**shape, max_position_embeddings=128, type_vocab_size=2)),
    }
    directories = {}
    for seed, (name, (model_class, config)) in enumerate(models.items()):
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp(name)
        model_class(config).save_pretrained(directory)
        _tokenizer(with_segments=name == "bert").save_pretrained(directory)
        directories[name] = str(directory)
    return directories


@pytest.fixture(scope="session")
def causal_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny checkpoint with wide weights for every causal language model of the table, with the oracle's tokenizer."""
    import transformers

    shape = {
        "vocab_size": 1500,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    half_sliding = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    capped = {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    particular: dict[str, dict[str, Any]] = {
        "Gemma2": {"head_dim": 16, "sliding_window": 40, **capped},
        "Llama": {},
        "Mistral": {"sliding_window": 40},
        "Qwen2": half_sliding,
        "Qwen3": {"head_dim": 16, **half_sliding},
        "Gemma": {"head_dim": 16},
    }
    directories = {}
    for seed, (name, options) in enumerate(particular.items()):
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp(name)
        config = getattr(transformers, f"{name}Config")(**shape, **options)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(directory)
        PreTrainedTokenizerFast.from_pretrained(DATA / "decoder").save_pretrained(directory)
        directories[name] = str(directory)
    return directories


def _tokenizer(*, with_segments: bool) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DATA / "encoder")
    if with_segments:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return tokenizer
