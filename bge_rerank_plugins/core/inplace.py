"""Blocks of transformers' layers without the tensors they can do without: in place, and on a CPU on some rows at a time.

The operations are transformers' own, but for the order of sums. What is saved is memory that the system has to find: an allocator
gives tensors of tens of megabytes back to it, and to get their pages anew costs as much as some of the work on them. So blocks
overwrite what they are given where nobody reads it after them. Knows nothing of families: it looks for blocks by how they are
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from .int8 import Int8Linear
from .linear import PackedLinear
from .norms import RootMeanSquareNorm

ROWS = {"cpu": 1536}
"""Fewest rows of a part, by kind of device; all of them where it is not named. Products of fewer are slower."""

PACKED_ROWS = 1024
"""The same for float32 weights that oneDNN multiplies, whose products of so many rows are as fast, and come out in new memory."""

_IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {
    SiLUActivation: lambda states: silu(states, inplace=True),
    nn.SiLU: lambda states: silu(states, inplace=True),
    GELUActivation: torch.ops.aten.gelu_,
    GELUTanh: lambda states: torch.ops.aten.gelu_(states, approximate="tanh"),
}


def parts_of(states: Tensor, fewest: int | None = None) -> tuple[Tensor, ...]:
    """Views of some rows each, of about the same number, which is not below `fewest`, by default the device's `ROWS`."""
    rows = states.shape[-2]
    count = max(1, rows // (fewest or ROWS.get(states.device.type, rows + 1)))
    return torch.split(states, max(1, -(-rows // count)), dim=-2)


def _parts_for(layer: nn.Module, states: Tensor) -> tuple[Tensor, ...]:
    """Parts of the states that a layer is given one after the other."""
    packed = isinstance(layer, PackedLinear) and states.dtype == torch.float32
    return parts_of(states, PACKED_ROWS if packed else None)


class Workspace:
    """Memory for a product that is read before the next one is written there, kept for as long as the model is."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def product(self, layer: nn.Module, states: Tensor) -> Tensor:
        """`layer(states)`, in this workspace if `put_product` needs no tensor for it. Valid until the next call."""
        if not isinstance(layer, Int8Linear) and not _is_plain(layer, states):
            product: Tensor = layer(states)
            return product
        shape = (*states.shape[:-1], layer.out_features)
        size = math.prod(shape)
        if self._held.numel() < size:
            self._held = states.new_empty(size)
        workspace = self._held[:size].view(shape)
        put_product(workspace, layer, states)
        return workspace


def put_product(place: Tensor, layer: nn.Module, states: Tensor) -> None:
    """`place[:] = layer(states)`, without a tensor for the product if torch's own layer or an int8 one computes it on a CPU."""
    if isinstance(layer, Int8Linear):
        layer.put(place, states)
    elif not _is_plain(layer, states):
        place.copy_(layer(states))
    elif layer.bias is None:
        torch.mm(_rows(states), layer.weight.T, out=_rows(place))
    else:
        torch.addmm(layer.bias, _rows(states), layer.weight.T, out=_rows(place))


def add_product(total: Tensor, layer: nn.Module, states: Tensor) -> None:
    """`total += layer(states)`, without a tensor for the product if torch's own layer in float32, or an int8 one, computes it."""
    if isinstance(layer, Int8Linear):
        layer.add(total, states)
    elif _is_plain(layer, states) and states.dtype == torch.float32:
        if layer.bias is not None:
            total += layer.bias
        _rows(total).addmm_(_rows(states), layer.weight.T)
    else:
        total += layer(states)


def _is_plain(layer: nn.Module, states: Tensor) -> TypeGuard[nn.Linear]:
    """Whether torch multiplies this in place as fast as not: in half precision a bias would be a pass of its own."""
    plain = type(layer) is nn.Linear and states.device.type == "cpu"
    return plain and (states.dtype == torch.float32 or layer.bias is None)


def _rows(states: Tensor) -> Tensor:
    """In two dimensions: parts of three are multiplied in batches of one, for which torch copies weights in half precision."""
    return states.view(-1, states.shape[-1])


class Projection(nn.Module):
    """A linear layer whose product stands in a workspace, for inference only.

    Args:
        layer: The layer that it replaces.
        workspace: Where its product is read before the next layer's is written.
    """

    def __init__(self, layer: nn.Linear | Int8Linear, workspace: Workspace) -> None:
        super().__init__()
        self._layer, self._workspace = layer, workspace

    def forward(self, states: Tensor) -> Tensor:
        """Shape (..., features)."""
        return self._workspace.product(self._layer, states)


class GatedBlock(nn.Module):
    """The feed-forward block of the LLM families, down(activation(gate(x)) * up(x)), for inference only.

    Args:
        block: The block that it replaces.
        activate: Its activation, in place.
        workspaces: For the wide states, two of which are read together.
    """

    def __init__(
        self, block: Any, activate: Callable[[Tensor], Tensor], workspaces: tuple[Workspace, Workspace]
    ) -> None:
        super().__init__()
        self._gate, self._up, self._down = block.gate_proj, block.up_proj, block.down_proj
        self._activate = activate
        self._workspaces = workspaces

    def forward(self, states: Tensor) -> Tensor:
        """Shape (..., hidden), as `states`."""
        parts = _parts_for(self._gate, states)
        if len(parts) == 1:
            whole: Tensor = self._down(self._wide(states))
            return whole
        output = torch.empty_like(states)
        for part, place in zip(parts, _parts_for(self._gate, output), strict=True):
            put_product(place, self._down, self._wide(part))
        return output

    def _wide(self, states: Tensor) -> Tensor:
        gate_workspace, up_workspace = self._workspaces
        gated = self._activate(gate_workspace.product(self._gate, states))
        gated *= up_workspace.product(self._up, states)
        return gated


class Residual(nn.Module):
    """The end of BERT's blocks, norm(dense(x) + residual), for inference only.

    Args:
        block: The block that it replaces.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.dense, self.norm = block.dense, block.LayerNorm

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Shape (..., hidden), as `residual`, which it overwrites."""
        add_product(residual, self.dense, states)
        normed: Tensor = self.norm(residual)
        return normed


class FeedForward(nn.Module):
    """Both halves of BERT's feed-forward block, in place of the second one; the first one's place is left to the identity.

    Args:
        intermediate: The first half.
        output: The second one, which adds the states before the first.
        workspace: For the states between them.
    """

    def __init__(self, intermediate: Any, output: Residual, workspace: Workspace) -> None:
        super().__init__()
        self._up = intermediate.dense
        self._activate = _IN_PLACE.get(type(intermediate.intermediate_act_fn), intermediate.intermediate_act_fn)
        self._down, self._norm = output.dense, output.norm
        self._workspace = workspace

    def forward(self, states: Tensor, _: Tensor) -> Tensor:
        """Shape (..., hidden), as `states`, which the layer hands over twice, and which it overwrites."""
        for part in _parts_for(self._up, states):
            add_product(part, self._down, self._activate(self._workspace.product(self._up, part)))
        normed: Tensor = self._norm(states)
        return normed


def work_in_place(model: nn.Module) -> None:
    """Replaces the blocks of these builds; leaves all others as they are, and those whose activation is not known."""
    modules: list[Any] = list(model.modules())
    workspace, other_workspace = Workspace(), Workspace()
    projected = {name: Workspace() for name in ("query", "key", "value")}  # in layers of BERT's build
    for module in modules:
        for name, child in list(module.named_children()):
            if name in projected and type(child) in (nn.Linear, Int8Linear):
                setattr(module, name, Projection(child, projected[name]))
            parts = {part for part, _ in child.named_children()}
            activate = _IN_PLACE.get(type(getattr(child, "act_fn", None)))
            if parts == {"gate_proj", "up_proj", "down_proj", "act_fn"} and activate is not None:
                setattr(module, name, GatedBlock(child, activate, (workspace, other_workspace)))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, RootMeanSquareNorm(child))
            elif parts == {"dense", "LayerNorm", "dropout"} and type(child).__name__.endswith("Output"):
                setattr(module, name, Residual(child))
        if hasattr(module, "feed_forward_chunk"):  # a layer of BERT's build
            module.output = FeedForward(module.intermediate, module.output, workspace)
            module.intermediate = nn.Identity()
