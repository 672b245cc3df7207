"""Linear layers for a CPU by oneDNN: weights laid out once the way it multiplies them, or as they lie, if memory is dearer.

The operators are private to torch, so every use is tried out first and compared with torch's own product; where it fails or
differs, the layers stay as they are, and so they do where torch's own product is as fast. Knows nothing of families, packs or
scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from transformers.activations import GELUActivation


class PackedLinear(nn.Module):
    """A linear layer that oneDNN multiplies, for inference only.

    Args:
        layer: The layer that it replaces.
        gelu: Whether GELU, the exact one, follows in the same pass.
        copy: Whether its weight is laid out for oneDNN, in other memory; products of the weight as it lies take a tenth longer.
    """

    def __init__(self, layer: nn.Linear, *, gelu: bool = False, copy: bool = True) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight) if copy else weight
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._then: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, states: Tensor) -> Tensor:
        """The product with the bias, or its GELU. Shape (..., features)."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, *self._then)
        return product


def pack_linear_layers(model: nn.Module) -> None:
    """Replaces the linear layers of a cross-encoder on a CPU.

    Does nothing on other devices, nor where the operators are missing, fail or compute something else. Not for the LLM families:
    the file that their weights are mapped from would stay in memory beside the copies.
    """
    found = _precisions(model)
    if not found or not all(pays(dtype) and can_pack(dtype) for dtype in found):
        return
    for module in list(model.modules()):
        _fuse_activation(module)
    replace_linear_layers(model, PackedLinear)


def multiply_by_onednn(model: nn.Module) -> None:
    """Has oneDNN multiply what torch would give to a slower BLAS, in float32 on a CPU, with the weights where they are.

    Does nothing where `pack_linear_layers` does nothing, nor in half precision, where torch's own products are oneDNN's.
    """
    if _precisions(model) == {torch.float32} and onednn_beats_blas() and can_pack(torch.float32):
        replace_linear_layers(model, partial(PackedLinear, copy=False))


def _precisions(model: nn.Module) -> set[torch.dtype]:
    """Those of the linear layers' weights; none if one of them is not on a CPU."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return {weight.dtype for weight in weights} if all(weight.device.type == "cpu" for weight in weights) else set()


def replace_linear_layers(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replaces the linear layers of a model one after the other: weights that are copied are never all there twice."""
    for module in [each for each in model.modules() if type(each) is not nn.Linear]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, replacement(child))


def _fuse_activation(module: Any) -> None:
    """The first half of BERT's feed-forward block."""
    exact_gelu = type(getattr(module, "intermediate_act_fn", None)) is GELUActivation
    if exact_gelu and type(getattr(module, "dense", None)) is nn.Linear:
        module.dense = PackedLinear(module.dense, gelu=True)
        module.intermediate_act_fn = nn.Identity()


@cache
def pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN is to multiply: in half precision; in float32 where it is faster than what torch takes."""
    return by_onednn(dtype) or (dtype == torch.float32 and onednn_beats_blas())


@cache
def onednn_beats_blas() -> bool:
    """Whether oneDNN multiplies float32 faster than torch's BLAS: on AMD processors with AVX512, which MKL does not use."""
    processor = torch.cpu.get_capabilities()
    return "AMD" in str(processor.get("cpu_name")) and bool(processor.get("avx512_f"))


def rows_for(rows: int) -> int:
    """The next of few sizes, a sixteenth apart.

    oneDNN compiles code for every number of rows, which takes milliseconds, and keeps up to 1,024 such programs of up to a
    megabyte each; products of any number of rows would fill that.
    """
    step = max(8, (1 << rows.bit_length()) // 32)
    return -(-rows // step) * step


def in_few_sizes(rows: Tensor, states: Tensor) -> Tensor:
    """Numbers of the states' rows, one of them repeated until oneDNN's products of these rows have one of few sizes."""
    if states.device.type != "cpu" or not pays(states.dtype):
        return rows
    missing = rows_for(len(rows)) - len(rows)
    return torch.cat([rows, rows[:1].expand(missing)])


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether torch's own products on a CPU are oneDNN's: in half precision. In float32 they are those of a BLAS."""
    return dtype in (torch.bfloat16, torch.float16)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the operators are there, and compute what torch's own do, in this precision on this processor."""
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return dtype in (torch.float32, torch.bfloat16) and _agrees(dtype)
    except Exception:  # private operators: gone, with other arguments, or whatever they raise
        return False


def trial() -> tuple[nn.Linear, Tensor]:
    """A small layer and states to try operators on, that are private to torch and may be gone or changed."""
    layer = nn.Linear(48, 32, dtype=torch.float32).requires_grad_(False)  # whatever the process's default is
    layer.weight.copy_(torch.arange(48 * 32).reshape(32, 48).remainder(7) / 7 - 0.4)
    layer.bias.copy_(torch.arange(32) / 32)
    return layer, torch.arange(5 * 48, dtype=torch.float32).reshape(5, 48).remainder(11) / 11 - 0.5


def _agrees(dtype: torch.dtype) -> bool:
    """Every form that is used here beside torch's own, on a small product that has an exact order of magnitude."""
    layer, states = trial()
    with torch.no_grad():
        layer, states = layer.to(dtype), states.to(dtype)
        product = linear(states.float(), layer.weight.float(), layer.bias.float())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        results = [
            (PackedLinear(layer)(states), product),
            (PackedLinear(layer, gelu=True)(states), gelu(product)),
        ]
        if dtype == torch.float32:
            results.append((PackedLinear(layer, copy=False)(states), product))
        return all(
            torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=tolerance)
            for result, expected in results
        )
