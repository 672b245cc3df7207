"""Keys and values of shared prefixes that outlive the pack they were computed in, for the packs that go on with their request.

A request of more passages than a pack holds is scored in several; its query is computed in the first of them and read in the
others. Knows nothing of engines or families: layers are told apart by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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

    def of(self, groups: Iterable[int]) -> Prefixes:
        """Those of some groups, as far as they are here, without a copy."""
        chosen = Prefixes()
        chosen._states = {group: self._states[group] for group in groups if group in self}
        return chosen

    def put(self, group: int, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps a copy of a group's keys and values in a layer. Shapes (prefix, key_value_heads, head_dim)."""
        self._states.setdefault(group, {})[layer] = key.clone(), value.clone()

    def get(self, group: int, layer: int) -> tuple[Tensor, Tensor]:
        """A group's keys and values in a layer."""
        return self._states[group][layer]


@dataclass(frozen=True)
class Carried:
    """What a pack reads of the prefixes of earlier packs, and leaves of its own for later ones.

    Attributes:
        before: The prefixes of earlier packs.
        read: Groups of them that stand behind the pack's own keys, in this order.
        after: The prefixes for later packs, complete once every layer has been computed.
        own: Groups of them whose prefixes stand in this pack, and their rows.
    """

    before: Prefixes = field(default_factory=Prefixes)
    read: tuple[int, ...] = ()
    after: Prefixes = field(default_factory=Prefixes)
    own: tuple[tuple[int, slice], ...] = ()

    def carry(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps what later packs go on with of a layer, and puts what this one reads behind its keys and values."""
        for group, rows in self.own:
            self.after.put(group, layer, key[rows], value[rows])
        if not self.read:
            return key, value
        keys, values = zip((key, value), *(self.before.get(group, layer) for group in self.read), strict=True)
        return torch.cat(keys), torch.cat(values)
