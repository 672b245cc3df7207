"""Linear layers that multiply whole numbers of 8 bits, on a CPU: weights rounded once, states row by row as they come.

An output of the weights has a scale of its own, and a row of the states a scale and a least number (Dettmers et al. 2022,
"LLM.int8()": vector-wise quantisation), so a row's result does not depend on the rows beside it. Weights use 7 of the 8 bits:
processors without VNNI add two products in 16 bits, and would cut off what 8 bits make of them. The operators are private to
torch, so they are tried out first.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .linear import replace_linear_layers, rows_for, trial

ROWS = 1024
"""Rows that are rounded, multiplied and scaled before the next ones: the processor's caches hold them all the while."""

_LARGEST_WEIGHT = 63
_LARGEST_STATE = 255
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """A linear layer with weights of 7 bits and inputs of 8, for inference only. States are float32.

    Args:
        layer: The layer that it replaces.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self._scales = (weight.abs().amax(dim=1) / _LARGEST_WEIGHT).clamp_(min=_TINY)
        rounded = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._weight: Tensor = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._no_shift = torch.zeros(len(rounded), dtype=torch.int32)
        self._of_ones = rounded.sum(dim=1) * self._scales
        self._bias = torch.zeros_like(self._scales) if layer.bias is None else layer.bias.detach().float()
        self.out_features = layer.out_features

    def forward(self, states: Tensor) -> Tensor:
        """The product with the bias. Shape (..., features)."""
        product = states.new_empty((*states.shape[:-1], self.out_features))
        self.put(product, states)
        return product

    def put(self, place: Tensor, states: Tensor) -> None:
        """`place[:] = self(states)`, without a tensor for all of the product."""
        for place_part, part in self._parts(place, states):
            product, scales, least = self._product(part)
            torch.addcmul(self._bias, product, scales, out=place_part)
            place_part.addcmul_(least, self._of_ones)

    def add(self, total: Tensor, states: Tensor) -> None:
        """`total += self(states)`, likewise."""
        for total_part, part in self._parts(total, states):
            product, scales, least = self._product(part)
            total_part.addcmul_(product, scales).addcmul_(least, self._of_ones)
            total_part += self._bias

    @staticmethod
    def _parts(place: Tensor, states: Tensor) -> zip[tuple[Tensor, Tensor]]:
        rows = place.view(-1, place.shape[-1]), states.reshape(-1, states.shape[-1])
        return zip(*(torch.split(of, ROWS) for of in rows), strict=True)

    def _product(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The product of the rounded states, before it is scaled by row; the rows' scales, and their least numbers.

        A number x of a row is about scale * n + least, n whole, so its row's product with the weights is scale * (product of
        the n) + least * (product of ones).
        """
        least, largest = states.amin(dim=-1, keepdim=True), states.amax(dim=-1, keepdim=True)  # `aminmax` is slower
        scales = ((largest - least) / _LARGEST_STATE).clamp_(min=_TINY)
        numbers = states - (least - scales / 2)  # half a step up, since what is behind the point is cut off
        numbers /= scales
        rounded = torch.empty((rows_for(len(states)), states.shape[-1]), dtype=torch.uint8)
        rounded[: len(states)] = numbers
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1.0, 0, self._weight, self._scales, self._no_shift, None, 1.0, 0, torch.float32, "none", [], "")
        )
        return product[: len(states)], scales, least


def round_linear_layers(model: nn.Module) -> None:
    """Replaces the linear layers of a model on a CPU, in float32."""
    replace_linear_layers(model, Int8Linear)


@cache
def can_multiply_int8() -> bool:
    """Whether the operators are there, and compute on this processor what they must, with the largest of numbers, too."""
    layer, states = trial()
    layer.weight[:2] = 1.0
    states[0, 1:] = 1.0
    try:
        rounded = Int8Linear(layer)(states)
    except Exception:  # private operators: gone, with other arguments, or whatever they raise
        return False
    return torch.allclose(rounded, layer(states), rtol=2e-2, atol=5e-2)
