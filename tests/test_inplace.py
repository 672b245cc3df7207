"""Blocks that work in place and in parts compute what transformers' own do."""

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
from bge_rerank_plugins.core.inplace import (
    FeedForward,
    GatedBlock,
    Projection,
    Residual,
    Workspace,
    add_product,
    parts_of,
    work_in_place,
)


def rows_seen_by(module: nn.Module) -> list[int]:
    """How many rows a module is given, call by call from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[-2]))
    return rows


def rows_given_to(function: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and features of the states that a product of `inplace` is made of, call by call from now on."""
    seen: list[tuple[int, int]] = []

    def watched(place: torch.Tensor, layer: nn.Module, states: torch.Tensor) -> None:
        seen.append((states.shape[-2], states.shape[-1]))
        function(place, layer, states)

    monkeypatch.setattr(inplace, function.__name__, watched)
    return seen


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
    seen = rows_given_to(inplace.put_product, monkeypatch)
    torch.testing.assert_close(ours["mlp"](states), theirs["mlp"](states), rtol=1e-6, atol=1e-7)
    assert torch.equal(states, before)
    to_wide = [count for count, width in seen if width == 16]
    assert sum(to_wide) == 2 * 29, "a wide state that is not in a workspace"
    assert max(to_wide) < (2 * rows if rows < 29 else 30), "not in parts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_parts_of_a_gated_block_are_not_multiplied_in_batches(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inplace.ROWS, "cpu", 4)
    block = gated("silu").to(dtype)
    work_in_place(block)
    with torch.profiler.profile(acc_events=True) as profile:
        block["mlp"](torch.randn(1, 29, 16, dtype=dtype))
    names = {event.key for event in profile.key_averages()}
    assert "aten::mm" in names
    assert "aten::bmm" not in names, "which copies the weights"


@torch.inference_mode()
def test_the_wide_states_of_all_layers_stand_in_the_same_two_workspaces() -> None:
    model = nn.ModuleList([gated("silu") for _ in range(3)])
    work_in_place(model)
    workspaces = {module._workspaces for module in model.modules() if isinstance(module, GatedBlock)}
    assert len(workspaces) == 1
    assert len(set(workspaces.pop())) == 2, "two that are read together in one workspace"


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
    assert len([module for module in ours.modules() if isinstance(module, Residual)]) == 2
    assert len([module for module in ours.modules() if isinstance(module, FeedForward)]) == 2
    workspaces = [module._workspace for module in ours.modules() if isinstance(module, Projection)]
    assert len(workspaces) == 6
    assert len(set(workspaces[:3])) == 3, "two that are read together in one workspace"
    assert workspaces[:3] == workspaces[3:], "one layer's beside the other's"
    seen: list[int] = []
    product = Workspace.product

    def watched(workspace: Workspace, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        if layer.weight.shape == (48, 32):
            seen.append(states.shape[-2])
        return product(workspace, layer, states)

    monkeypatch.setattr(Workspace, "product", watched)
    states = torch.randn(1, 29, 32)
    want = theirs(states)[0]
    torch.testing.assert_close(ours(states)[0], want, rtol=1e-5, atol=1e-6)
    seen = seen[: len(seen) // 2]  # of the first of two layers
    assert sum(seen) == 29
    assert max(seen) < (2 * rows if rows < 29 else 30), "not in parts"


@given(rows=st.integers(0, 100), least=st.integers(1, 40))
def test_parts_are_of_about_the_same_size_and_cover_every_row(rows: int, least: int) -> None:
    states = torch.arange(rows * 3.0).view(rows, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inplace.ROWS, "cpu", least)
        parts = parts_of(states)
    assert torch.equal(torch.cat(parts), states)
    sizes = [len(part) for part in parts]
    assert max(sizes) < 2 * least or len(sizes) == 1
    assert parts[0].data_ptr() == states.data_ptr(), "a copy"


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(shapes=SHAPES, bias=st.booleans())
@torch.inference_mode()
def test_a_workspace_holds_products_of_any_shape_one_after_another(
    dtype: torch.dtype, shapes: list[tuple[int, int, int]], bias: bool
) -> None:
    workspace = Workspace()
    for rows, inputs, outputs in shapes:
        layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
        states = torch.randn(1, rows, inputs, dtype=dtype)
        torch.testing.assert_close(workspace.product(layer, states), layer(states))


@torch.inference_mode()
def test_a_workspace_is_made_once() -> None:
    workspace = Workspace()
    large, small = (workspace.product(nn.Linear(4, 8), torch.randn(1, rows, 4)) for rows in (9, 3))
    assert large.data_ptr() == small.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["torch's own", "another"])
@torch.inference_mode()
def test_a_product_is_added_in_place(kind: str, bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(5, 7, bias=bias, dtype=dtype)
    states, total = torch.randn(1, 6, 5, dtype=dtype), torch.randn(1, 6, 7, dtype=dtype)
    want = total + layer(states)
    products = rows_seen_by(layer)
    add_product(total, layer if kind == "torch's own" else nn.Sequential(layer), states)
    torch.testing.assert_close(total, want)
    assert bool(products) == (kind == "another" or dtype != torch.float32), "a tensor for the product"
