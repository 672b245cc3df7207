"""Blocks of transformers' layers without the tensors they can do without: in place, and on a CPU on some rows at a time.

The operations and their order are transformers' own. What is saved is memory that the system has to find: an allocator gives
tensors of tens of megabytes back to it, and to get their pages anew costs as much as some of the work on them. Knows nothing of
families: it looks for blocks by how they are built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

ROWS = {"cpu": 1536}
"""Fewest rows of a part, by kind of device; all of them where it is not named. Products of fewer are slower."""

_IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {
    SiLUActivation: lambda states: silu(states, inplace=True),
    nn.SiLU: lambda states: silu(states, inplace=True),
    GELUActivation: torch.ops.aten.gelu_,
    GELUTanh: lambda states: torch.ops.aten.gelu_(states, approximate="tanh"),
}


def in_parts(compute: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """What `compute` makes of `states`, row by row and of their shape, on parts of about the same size."""
    rows = states.shape[-2]
    count = rows // ROWS.get(states.device.type, rows + 1)
    if count < 2:
        return compute(states)
    output = torch.empty_like(states)
    size = -(-rows // count)
    for part, room in zip(torch.split(states, size, dim=-2), torch.split(output, size, dim=-2), strict=True):
        room.copy_(compute(part))
    return output


class GatedBlock(nn.Module):
    """The feed-forward block of the LLM families, down(activation(gate(x)) * up(x)), for inference only.

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
        return in_parts(self._part, states)

    def _part(self, states: Tensor) -> Tensor:
        gated = self._activate(self._gate(states))
        gated *= self._up(states)
        output: Tensor = self._down(gated)
        return output


class Residual(nn.Module):
    """The end of BERT's blocks, norm(dense(x) + residual), for inference only.

    Args:
        block: The block that it replaces.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.dense, self.norm = block.dense, block.LayerNorm

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Shape (..., hidden), as `residual`."""
        total = self.dense(states)
        total += residual
        normed: Tensor = self.norm(total)
        return normed


class FeedForward(nn.Module):
    """Both halves of BERT's feed-forward block, in place of the second one; the first one's place is left to the identity.

    Args:
        intermediate: The first half.
        output: The second one, which adds the states before the first.
    """

    def __init__(self, intermediate: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self._intermediate, self._output = intermediate, output

    def forward(self, states: Tensor, _: Tensor) -> Tensor:
        """Shape (..., hidden), as `states`, which the layer hands over twice: as it is, and through the identity."""
        return in_parts(self._part, states)

    def _part(self, states: Tensor) -> Tensor:
        output: Tensor = self._output(self._intermediate(states), states)
        return output


class Activation(nn.Module):
    """An activation over its input."""

    def __init__(self, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._activate = activate

    def forward(self, states: Tensor) -> Tensor:
        """Shape as `states`, which it overwrites."""
        return self._activate(states)


def work_in_place(model: nn.Module) -> None:
    """Replaces the blocks of these builds; leaves all others as they are, and those whose activation is not known."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        for name, child in list(module.named_children()):
            parts = {part for part, _ in child.named_children()}
            activate = _IN_PLACE.get(type(getattr(child, "act_fn", None)))
            if parts == {"gate_proj", "up_proj", "down_proj", "act_fn"} and activate is not None:
                setattr(module, name, GatedBlock(child, activate))
            elif parts == {"dense", "LayerNorm", "dropout"} and type(child).__name__.endswith("Output"):
                setattr(module, name, Residual(child))
        inner = _IN_PLACE.get(type(getattr(module, "intermediate_act_fn", None)))
        if inner is not None:
            module.intermediate_act_fn = Activation(inner)
        if hasattr(module, "feed_forward_chunk"):  # a layer of BERT's build
            module.intermediate, module.output = nn.Identity(), FeedForward(module.intermediate, module.output)
