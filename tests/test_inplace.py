"""Blocks that work in place and in parts compute what transformers' own do, and leave what they are given as it was."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP

from bge_rerank_plugins.core import inplace
from bge_rerank_plugins.core.inplace import FeedForward, GatedBlock, Residual, in_parts, work_in_place


def rows_seen_by(module: nn.Module) -> list[int]:
    """How many rows a module is given, call by call from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[-2]))
    return rows


ENCODERS = {BertModel: BertConfig, RobertaModel: RobertaConfig, XLMRobertaModel: XLMRobertaConfig}


def gated(activation: str) -> Any:
    torch.manual_seed(0)
    config = GemmaConfig(hidden_size=16, intermediate_size=48, hidden_act=activation)
    return nn.ModuleDict({"mlp": GemmaMLP(config)}).eval()


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows", [4, 7, 64])
@torch.inference_mode()
def test_a_gated_block_computes_what_it_did(activation: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inplace.ROWS, "cpu", rows)
    ours = gated(activation)
    theirs = copy.deepcopy(ours)
    work_in_place(ours)
    assert isinstance(ours["mlp"], GatedBlock)
    states = torch.randn(1, 29, 16)
    before = states.clone()
    seen = rows_seen_by(ours["mlp"]._down)
    torch.testing.assert_close(ours["mlp"](states), theirs["mlp"](states), rtol=1e-6, atol=1e-7)
    assert torch.equal(states, before)
    assert sum(seen) == 29
    assert max(seen) < (2 * rows if rows < 29 else 30), "not in parts"


def test_a_block_with_an_activation_that_is_not_known_is_left_alone() -> None:
    other = gated("relu")
    assert type(ACT2FN["relu"]) not in inplace._IN_PLACE
    work_in_place(other)
    assert isinstance(other["mlp"], GemmaMLP)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("rows", [4, 7, 64])
@torch.inference_mode()
def test_layers_of_encoders_compute_what_they_did(
    kind: Any, activation: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inplace.ROWS, "cpu", rows)
    torch.manual_seed(0)
    config = ENCODERS[kind](
        vocab_size=9,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_act=activation,
    )
    ours = kind(config, add_pooling_layer=False).eval().encoder
    theirs = copy.deepcopy(ours)
    work_in_place(ours)
    assert len([module for module in ours.modules() if isinstance(module, Residual)]) == 4
    blocks = [module for module in ours.modules() if isinstance(module, FeedForward)]
    assert len(blocks) == 2
    seen = rows_seen_by(blocks[0]._intermediate)
    states = torch.randn(1, 29, 32)
    before = states.clone()
    torch.testing.assert_close(ours(states)[0], theirs(states)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(states, before)
    assert sum(seen) == 29
    assert max(seen) < (2 * rows if rows < 29 else 30), "not in parts"


@given(rows=st.integers(0, 100), least=st.integers(1, 40))
def test_parts_are_of_about_the_same_size_and_cover_every_row(rows: int, least: int) -> None:
    sizes: list[int] = []

    def compute(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part + 1

    states = torch.arange(rows * 3.0).view(rows, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inplace.ROWS, "cpu", least)
        assert torch.equal(in_parts(compute, states), states + 1)
    assert sum(sizes) == rows
    assert max(sizes) < 2 * least or len(sizes) == 1
