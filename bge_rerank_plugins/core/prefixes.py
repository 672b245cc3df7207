"""Keys and values of shared prefixes that outlive the pack they were computed in, for the packs that go on with their request.

A request of more passages than a pack holds is scored in several; its query is computed in the first of them and read in the
others. Knows nothing of engines or families: layers are told apart by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Prefixes:
    """The keys and values of some groups' prefixes in every layer that was computed."""

    def __init__(self) -> None:
        self._states: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    def __iter__(self) -> Iterator[int]:
        """The groups."""
        return iter(self._states)

    def __contains__(self, group: int) -> bool:
        return group in self._states

    def take_over(self, other: Prefixes, groups: Iterable[int]) -> None:
        """Holds what another one holds of these groups, without a copy."""
        self._states.update({group: other._states[group] for group in groups if group in other})

    def put(self, group: int, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps a copy of a group's keys and values in a layer. Shapes (prefix, key_value_heads, head_dim)."""
        self._states.setdefault(group, {})[layer] = key.clone(), value.clone()

    def behind(self, groups: Iterable[int], layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with those of the groups' prefixes behind them, in the order of `groups`."""
        kept = [self._states[group][layer] for group in groups]
        return torch.cat([key, *(states[0] for states in kept)]), torch.cat([value, *(states[1] for states in kept)])
