"""The feed-forward block of the LLM families, down(activation(gate(x)) * up(x)), without tensors it can do without.

The operations and their order are transformers' own; they work in place, and on a CPU on some rows at a time, whose states
stay in its caches. Knows nothing of families: it looks for blocks of that build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

ROWS = {"cpu": 2048}
"""Rows at a time, by kind of device; all of them where it is not named."""

_IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {
    SiLUActivation: lambda states: silu(states, inplace=True),
    nn.SiLU: lambda states: silu(states, inplace=True),
    GELUActivation: torch.ops.aten.gelu_,
    GELUTanh: lambda states: torch.ops.aten.gelu_(states, approximate="tanh"),
}


class GatedBlock(nn.Module):
    """A feed-forward block, for inference only.

    Args:
        block: The block that it replaces.
        activate: Its activation, in place.
    """

    def __init__(self, block: Any, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._gate, self._up, self._down = block.gate_proj, block.up_proj, block.down_proj
        self._activate = activate

    def forward(self, states: Tensor) -> Tensor:
        """Shape (..., hidden), as `states`."""
        parts = torch.split(states, ROWS.get(states.device.type, states.shape[-2]), dim=-2)
        if len(parts) == 1:
            return self._part(states)
        output = torch.empty_like(states)
        for part, room in zip(parts, torch.split(output, parts[0].shape[-2], dim=-2), strict=True):
            room.copy_(self._part(part))
        return output

    def _part(self, states: Tensor) -> Tensor:
        gated = self._activate(self._gate(states))
        gated *= self._up(states)
        output: Tensor = self._down(gated)
        return output


def use_gated_blocks(model: nn.Module) -> None:
    """Replaces the feed-forward blocks of that build whose activation is known; leaves all others as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            names = {part for part, _ in child.named_children()}
            activate = _IN_PLACE.get(type(getattr(child, "act_fn", None)))
            if names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and activate is not None:
                setattr(module, name, GatedBlock(child, activate))
