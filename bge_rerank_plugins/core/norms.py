"""The norms of the LLM families, in parts on a CPU and in one kernel elsewhere.

What is saved is the tensors that transformers' own make on the way. Knows nothing of families: whether a norm is of a known form
is tried out, not read off its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

NUMBERS_AT_HAND = {"cpu": 2**18}
"""Numbers of a part that is passed over several times: the processor's caches hold it, and what is made of it on the way."""


class RootMeanSquareNorm(nn.Module):
    """A norm of the LLM families, for inference only: what is made on the way, much of it in float32, is small.

    Other devices than a CPU have a kernel that makes nothing on the way.

    Args:
        norm: The norm that it replaces.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._norm = norm
        self._in_one_kernel = None if norm.weight.device.type == "cpu" else norm_in_one_kernel(norm)

    def forward(self, states: Tensor) -> Tensor:
        """Shape (..., features), as `states`."""
        if self._in_one_kernel is not None:
            return self._in_one_kernel(states)
        numbers = NUMBERS_AT_HAND.get(states.device.type, states.numel())
        if states.numel() <= numbers:
            whole: Tensor = self._norm(states)
            return whole
        output = torch.empty_like(states)
        rows = max(1, numbers // states.shape[-1])
        parts, places = (torch.split(of.view(-1, of.shape[-1]), rows) for of in (states, output))
        for part, place in zip(parts, places, strict=True):
            place.copy_(self._norm(part))
        return output


def _scaled(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of Llama's kind."""
    return rms_norm(states, weight.shape, weight, epsilon)


def _scaled_from_one(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of Gemma's kind, which scales by one more than its weights."""
    normed = rms_norm(states, weight.shape, None, epsilon)
    return torch.addcmul(normed, normed, weight)


@torch.no_grad()
def norm_in_one_kernel(norm: Any) -> Callable[[Tensor], Tensor] | None:
    """What a norm computes, by torch's own `rms_norm`; None if that computes something else, as is tried out in float32."""
    epsilon: float = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    exact = copy.deepcopy(norm).float()
    weight: Tensor = exact.weight
    numbers = torch.arange(2 * weight.numel(), dtype=torch.float32, device=weight.device)
    states = (numbers.remainder(11) / 11 - 0.4).view(2, -1)
    expected = exact(states)
    for form in (_scaled, _scaled_from_one):
        if torch.allclose(form(states, weight, epsilon), expected, rtol=1e-4, atol=1e-6):
            return partial(form, weight=norm.weight, epsilon=epsilon)
    return None
