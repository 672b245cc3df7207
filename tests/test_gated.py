"""The feed-forward block in place computes what the block does."""

import copy

import pytest
import torch
from torch import nn
from transformers import GemmaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP

from bge_rerank_plugins.core import gated
from bge_rerank_plugins.core.gated import GatedBlock, use_gated_blocks


def model(activation: str) -> nn.Module:
    torch.manual_seed(0)
    config = GemmaConfig(hidden_size=16, intermediate_size=48, hidden_act=activation)
    return nn.ModuleDict({"mlp": GemmaMLP(config)}).eval()


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows", [4, 7, 64])
@torch.inference_mode()
def test_it_computes_what_the_block_does(activation: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gated.ROWS, "cpu", rows)
    ours = model(activation)
    theirs = copy.deepcopy(ours)
    use_gated_blocks(ours)
    assert isinstance(ours["mlp"], GatedBlock)  # type: ignore[index]
    states = torch.randn(1, 29, 16)
    before = states.clone()
    assert torch.allclose(ours["mlp"](states), theirs["mlp"](states), rtol=1e-6, atol=1e-7)  # type: ignore[index]
    assert torch.equal(states, before)


def test_a_block_with_an_activation_that_is_not_known_is_left_alone() -> None:
    other = model("relu")
    assert type(ACT2FN["relu"]) not in gated._IN_PLACE
    use_gated_blocks(other)
    assert isinstance(other["mlp"], GemmaMLP)  # type: ignore[index]
