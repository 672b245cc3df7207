"""Linear layers laid out for the processor compute what they computed before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from bge_rerank_plugins.core import linear

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "gelu": lambda: XLMRobertaModel(XLMRobertaConfig(**SMALL, initializer_range=0.5), add_pooling_layer=False),
    "relu": lambda: XLMRobertaModel(
        XLMRobertaConfig(**SMALL, initializer_range=0.5, hidden_act="relu"), add_pooling_layer=False
    ),
}
needs_operators = pytest.mark.skipif(not linear.can_pack(torch.float32), reason="this torch has no such operators")


def made(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_is_the_same_function(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = made(name, dtype)
    ids = torch.arange(10, 40)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).last_hidden_state.float()
        linear.pack_linear_layers(model)
        got = model(input_ids=ids).last_hidden_state.float()
    left = [module for module in model.modules() if type(module) is nn.Linear]
    assert bool(left) == (not linear.can_pack(dtype)), "a layer was left out, or packed where that cannot be"
    torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().mean()), rtol=tolerance)


@needs_operators
@given(rows=st.integers(1, 70), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_packed_layer_takes_any_shape(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    states = torch.randn(1, rows, inputs)
    product, packed = layer(states), linear.PackedLinear(layer)
    with_gelu, as_it_lies = linear.PackedLinear(layer, gelu=True), linear.PackedLinear(layer, copy=False)
    torch.testing.assert_close(packed(states), product, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(with_gelu(states), torch.nn.functional.gelu(product), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(as_it_lies(states), product, atol=1e-5, rtol=1e-4)
    assert as_it_lies._weight.data_ptr() == layer.weight.data_ptr(), "a copy"


@needs_operators
@pytest.mark.parametrize(
    ("dtype", "faster", "replaced"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, True, False)],
)
def test_onednn_multiplies_in_place_of_a_slower_blas_alone(
    dtype: torch.dtype, faster: bool, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "onednn_beats_blas", lambda: faster)
    model = made("gelu", dtype)
    ids = torch.arange(10, 40)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).last_hidden_state
        linear.multiply_by_onednn(model)
        got = model(input_ids=ids).last_hidden_state
    kinds = {type(module) for module in model.modules()} & {nn.Linear, linear.PackedLinear}
    assert kinds == {linear.PackedLinear if replaced else nn.Linear}
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("replace", [linear.pack_linear_layers, linear.multiply_by_onednn])
def test_weights_on_another_device_are_left_alone(replace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_beats_blas", lambda: True)
    model = made("gelu", torch.float32).to("meta")
    replace(model)
    assert not [module for module in model.modules() if isinstance(module, linear.PackedLinear)]


linear_pays = linear.pays


@pytest.fixture(autouse=True)
def oneDNN_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor, so that what other processors do is tested on this one."""
    monkeypatch.setattr(linear, "pays", lambda dtype: True)


@pytest.mark.parametrize(
    ("processor", "in_float32"),
    [
        ({"cpu_name": "AMD EPYC 9R14", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8488C", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_weights_are_laid_out_for_oneDNN_where_it_is_the_faster(
    processor: dict[str, Any], in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an AMD processor without AVX512, a pack took a quarter longer with them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(linear, "onednn_beats_blas", linear.onednn_beats_blas.__wrapped__)
    assert linear_pays.__wrapped__(torch.bfloat16)
    assert linear_pays.__wrapped__(torch.float32) == in_float32


@given(rows=st.integers(1, 20_000))
def test_products_have_few_sizes_and_little_to_spare(rows: int) -> None:
    size = linear.rows_for(rows)
    assert 0 <= size - rows < max(8, rows / 16 + 1)
    assert linear.rows_for(size) == size
    assert len({linear.rows_for(other) for other in range(1, 4097)}) < 120


@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_scores_do_not_depend_on_what_fills_a_pack_up(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bge_rerank_plugins import Scorer
    from bge_rerank_plugins.core import worker
    from bge_rerank_plugins.core.packing import Pack, pack_sequences

    lengths: list[int] = []

    def packed(*arguments: Any) -> Pack:
        pack = pack_sequences(*arguments)
        lengths.append(len(pack))
        return pack

    monkeypatch.setattr(worker, "pack_sequences", packed)
    passages = ["", "panda", "the giant panda " * 9]
    scores = []
    for filled in (True, False):
        monkeypatch.setattr(worker, "pays", lambda dtype, filled=filled: filled)
        with Scorer(str(DATA / family), max_queued_tokens=10_000 + filled) as scorer:
            scores.append(scorer.score("a bear", passages))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert lengths[0] == linear.rows_for(lengths[1]) > lengths[1]


def missing(*_: object) -> None:
    raise AttributeError("no such operator")


def other_arguments(*_: object) -> None:
    raise RuntimeError("expected at most 3 arguments")


def something_else(states: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.zeros(*states.shape[:-1], 32, dtype=states.dtype)


def unfit(*_: object) -> None:
    raise ValueError("unfit")


@pytest.mark.parametrize("operator", [missing, other_arguments, something_else, unfit])
def test_operators_that_are_gone_or_differ_leave_the_layers_as_they_are(
    operator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = SimpleNamespace(
        _linear_pointwise=operator,
        _reorder_linear_weight=lambda weight: weight,
        _is_mkldnn_bf16_supported=lambda: True,
    )
    linear.can_pack.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(linear.torch.ops, "mkldnn", changed, raising=False)
            model = made("gelu", torch.float32)
            linear.pack_linear_layers(model)
    finally:
        linear.can_pack.cache_clear()
    assert [module for module in model.modules() if type(module) is nn.Linear]
    with torch.inference_mode():
        model(input_ids=torch.arange(10, 40)[None])


def test_half_precision_without_hardware_for_it_is_left_alone() -> None:
    assert not linear.can_pack(torch.float16)
    assert not linear.can_pack(torch.float64)


@pytest.mark.parametrize(
    ("dtype", "faster", "count"),
    [
        (torch.float32, False, 20),
        (torch.float32, True, 24),
        (torch.bfloat16, False, 24),
        (torch.float16, False, 24),
    ],
)
def test_rows_are_filled_up_for_onednn_only(
    dtype: torch.dtype, faster: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "onednn_beats_blas", lambda: faster)
    monkeypatch.setattr(linear, "pays", linear_pays.__wrapped__)
    rows = torch.arange(5, 25)
    filled = linear.in_few_sizes(rows, torch.zeros(30, 4, dtype=dtype))
    assert len(filled) == count
    assert torch.equal(filled[:20], rows)
    assert set(filled.tolist()) == set(rows.tolist()), "a row that nobody asked for"
