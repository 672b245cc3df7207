"""Linear layers in whole numbers of 8 bits: exactly what was meant to be rounded is, and rankings stay."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.core import int8
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.device import choose_precision
from bge_rerank_plugins.core.families import family_of
from bge_rerank_plugins.core.inplace import Workspace, add_product, put_product

CPU = torch.device("cpu")
needs_operators = pytest.mark.skipif(not int8.can_multiply_int8(), reason="this torch has no such operators")


@pytest.fixture
def tried_again() -> Iterator[None]:
    int8.can_multiply_int8.cache_clear()
    yield
    int8.can_multiply_int8.cache_clear()


def made(rows: int, inputs: int, outputs: int, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(rows + inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False), torch.randn(rows, inputs) * 3 + 1


def by_definition(layer: nn.Linear, states: Tensor) -> Tensor:
    """The product of rounded weights and rounded states, in float64."""
    weight, rows = layer.weight.double(), states.double()
    steps = weight.abs().amax(1, keepdim=True) / 63
    least = rows.amin(1, keepdim=True)
    row_steps = (rows.amax(1, keepdim=True) - least) / 255
    rounded = ((rows - least) / row_steps).round() * row_steps + least
    bias = 0 if layer.bias is None else layer.bias.double()
    return rounded @ ((weight / steps).round() * steps).T + bias


@needs_operators
@given(rows=st.integers(1, 40), inputs=st.integers(2, 70), outputs=st.integers(1, 70), bias=st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_product_is_that_of_the_rounded_numbers(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    """Within the few numbers that stand so near to a half that float32 rounds them to the other side."""
    layer, states = made(rows, inputs, outputs, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "ROWS", 16)
        got = int8.Int8Linear(layer)(states)
    want = by_definition(layer, states)
    largest = float(layer.weight.abs().max())
    step = float((states.amax(1) - states.amin(1)).max()) / 255 * largest
    assert (got - want).abs().max() < 2 * (step + largest / 63 * float(states.abs().max()))
    assert (got - want).abs().median() < 1e-5 * float(want.abs().max())
    # As near to the product as steps of a 63rd and a 255th allow.
    assert (got - layer(states)).abs().mean() < 0.02 * float(layer(states).abs().mean()) + step * inputs**0.5


@needs_operators
def test_it_is_put_added_and_kept_in_a_workspace_alike() -> None:
    layer, states = made(30, 24, 40)
    rounded = int8.Int8Linear(layer)
    product, place, total = rounded(states[None]), torch.full((1, 30, 40), torch.nan), torch.ones(1, 30, 40)
    put_product(place, rounded, states[None])
    add_product(total, rounded, states[None])
    assert torch.equal(place, product)
    assert torch.allclose(total, product + 1, atol=1e-5)
    assert torch.equal(Workspace().product(rounded, states[None]), product)


@needs_operators
def test_a_row_does_not_depend_on_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, states = made(50, 24, 40)
    rounded = int8.Int8Linear(layer)
    product = rounded(states)
    assert torch.equal(rounded(states.flip(0)).flip(0), product)
    assert torch.equal(torch.cat([rounded(row[None]) for row in states]), product)
    beside_others = torch.cat([states[:1], torch.full((3, 24), 1e9)])
    assert torch.equal(rounded(beside_others)[0], product[0])
    monkeypatch.setattr(int8, "ROWS", 7)
    assert torch.equal(rounded(states), product)


@needs_operators
def test_rows_of_one_number_are_exact_and_what_is_no_number_stays_none() -> None:
    layer, _ = made(1, 24, 40)
    layer.weight.copy_((layer.weight * 200).round() / 63)
    layer.weight[:, 0] = 1.0  # so that no weight is rounded
    rounded = int8.Int8Linear(layer)
    states = torch.tensor([0.0, 2.5, -1e4, torch.nan, torch.inf])[:, None].expand(5, 24).contiguous()
    product = rounded(states)
    torch.testing.assert_close(product[:3], layer(states[:3]), rtol=1e-5, atol=1e-5)
    assert not product[3:].isfinite().any()


def family(model: str, **options: Any) -> Any:
    asked = RerankSettings(model=model, **options)
    checkpoint = Checkpoint.from_settings(asked)
    return family_of(checkpoint).load(checkpoint, asked, CPU, torch.int8)


@needs_operators
@pytest.mark.parametrize(("name", "of_a_layer"), [("encoder", 6), ("decoder", 7), ("layerwise", 7)])
def test_every_layer_of_every_family_is_rounded_and_no_head(name: str, of_a_layer: int) -> None:
    loaded = family(str(DATA / name))
    layers = loaded._backbone.encoder.layer if name == "encoder" else loaded._backbone.layers
    kinds = [type(module) for module in loaded._backbone.modules()]
    assert kinds.count(int8.Int8Linear) == of_a_layer * len(layers) > 0
    assert nn.Linear not in kinds, "a layer was left out"
    if name == "encoder":  # its last layer computes few rows, and from the weights as they are
        exact = [*loaded._last_layer.modules(), *loaded._head.modules()]
        assert int8.Int8Linear not in map(type, exact)


@needs_operators
def test_weights_are_rounded_one_after_the_other_and_never_there_twice() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)))
    exact = [weakref.ref(block[0]) for block in model]
    left: list[int] = []

    class Counting(int8.Int8Linear):
        def __init__(self, layer: nn.Linear) -> None:
            left.append(sum(each() is not None for each in exact))
            super().__init__(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "Int8Linear", Counting)
        int8.round_linear_layers(model)
    assert left == [6, 5, 4, 3, 2, 1]
    assert not any(each() for each in exact)


@needs_operators
def test_layers_that_are_loaded_later_are_rounded_too() -> None:
    texts = ["panda", "the giant panda is a bear " * 5, ""]
    model = str(DATA / "layerwise")
    with Scorer(model, dtype="int8", cutoff_layer=3) as scorer:
        scorer.score("what is panda?", texts)
        layers = scorer.score_layers("what is panda?", texts, range(3, 12, 4))
    for layer, scores in layers.items():
        with Scorer(model, dtype="int8", cutoff_layer=layer) as scorer:
            assert scores == pytest.approx(scorer.score("what is panda?", texts), abs=1e-6)


@needs_operators
@pytest.mark.usefixtures("tried_again")
def test_the_operators_are_tried_in_float32_whatever_the_default_is() -> None:
    """In a process that computes in bfloat16 they were taken to be missing, for good."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert int8.can_multiply_int8()
    finally:
        torch.set_default_dtype(torch.float32)


@needs_operators
@pytest.mark.parametrize("model", ["embedded", "embedded-decoder", "embedded-layerwise"])
def test_int8_keeps_the_ranking_of_the_embedded_models(model: str) -> None:
    from scipy.stats import spearmanr

    from bge_rerank_plugins.docstrings import standard_library

    passages = ["", *(docstring.text[:400] for docstring in standard_library()[::60])]
    with Scorer(model) as exact, Scorer(model, dtype="int8") as rounded:
        for query in ("shorten a text to a width", "read a file line by line", "how do I parse a date"):
            both = exact.score(query, passages), rounded.score(query, passages)
            assert both[0] != both[1]
            assert spearmanr(*both).statistic > 0.98


@needs_operators
@pytest.mark.parametrize("name", ["encoder", "decoder", "layerwise"])
def test_scores_do_not_depend_on_company_or_budget(name: str) -> None:
    passages = ["", "panda", "the giant panda is a bear " * 5, "datetime.strptime", "大熊猫是中国特有的熊类动物。"]
    with Scorer(str(DATA / name), dtype="int8") as scorer:
        together = scorer.score("what is panda?", passages)
        assert together == pytest.approx(scorer.score("what is panda?", passages[::-1])[::-1], abs=1e-3)
        assert together == pytest.approx([scorer.score("what is panda?", [each])[0] for each in passages], abs=1e-3)
    with Scorer(str(DATA / name), dtype="int8", max_batch_tokens=40) as scorer:
        assert together == pytest.approx(scorer.score("what is panda?", passages), abs=1e-3)


def test_int8_is_for_a_cpu_only() -> None:
    with pytest.raises(ValueError, match="dtype='int8': for a CPU only, and the device is cuda:0; use 'fast'"):
        choose_precision("int8", torch.device("cuda:0"), float16_is_safe=True)


def missing(*_: object) -> None:
    raise AttributeError("no such operator")


def other_arguments(*_: object) -> None:
    raise RuntimeError("expected at most 3 arguments")


def out_of_range(*_: object) -> None:
    raise IndexError("out of range")


def in_bits(bits: int) -> Any:
    """As processors without VNNI multiply: pairs of products are added in 16 bits, and cut off beyond."""

    def product(states: Tensor, _: float, __: int, weight: Tensor, scales: Tensor, *___: object) -> Tensor:
        products = states.float()[:, None] * weight.float()
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return pairs.sum(-1) * scales

    return product


def other_operators(patch: pytest.MonkeyPatch, product: Any) -> None:
    changed = SimpleNamespace(qlinear_prepack=lambda weight, _: weight, qlinear_pointwise=product)
    patch.setattr(int8.torch.ops, "onednn", changed, raising=False)


@pytest.mark.usefixtures("tried_again")
def test_sums_of_16_bits_hold_the_largest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which weights have 7 bits and not 8."""
    other_operators(monkeypatch, in_bits(16))
    assert int8.can_multiply_int8()
    monkeypatch.setattr(int8, "_LARGEST_WEIGHT", 127)
    int8.can_multiply_int8.cache_clear()
    assert not int8.can_multiply_int8()


@pytest.mark.usefixtures("tried_again")
@pytest.mark.parametrize("operator", [missing, other_arguments, out_of_range, in_bits(15)])
def test_operators_that_are_gone_or_differ_are_an_error(operator: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        other_operators(patch, operator)
        with pytest.raises(
            ValueError, match="dtype='int8': this torch does not multiply such numbers on this processor"
        ):
            choose_precision("int8", CPU, float16_is_safe=True)
        with pytest.raises(ValueError, match="use 'float32'"):
            Scorer(str(DATA / "encoder"), dtype="int8").score("a", ["b"])


@needs_operators
def test_what_overflows_names_the_precision_to_use(encoder_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8.Int8Linear, "add", lambda self, total, states: total.fill_(torch.nan))
    with (
        Scorer(encoder_dir, dtype="int8") as scorer,
        pytest.raises(ValueError, match="in int8: use dtype='float32'"),
    ):
        scorer.score("a", ["b"])
