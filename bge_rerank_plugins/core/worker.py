"""What one worker thread of the engine owns: a device, a model on it, how much it takes at once, the prefixes it goes on with.

Knows nothing of requests, queues or threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import SharedCheckpoint
from .device import Precision, choose_device, choose_precision, free_memory, release_cached_memory
from .families import family_of
from .graphs import graphs_for
from .linear import pays, rows_for
from .packing import pack_sequences
from .prefixes import Prefixes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ..settings import RerankSettings
    from .sequences import TokenSequence

DEFAULT_BUDGET = {"cpu": 4096, "cuda": 16384}
OTHER_BUDGET = 8192
SMALLEST_BUDGET = 512

PACKS_BEFORE_GROWTH = 32
"""Packs that must fit after one did not, before the budget grows by an eighth."""


@dataclass(frozen=True)
class Pending:
    """Scores that a device is at, or has done.

    Attributes:
        scores: In the host's memory, once `copied` has happened. Shape (sequences,) or (sequences, cutoff_layers).
        copied: When they are there; None if they are.
    """

    scores: Tensor
    copied: Any = None

    @property
    def landed(self) -> bool:
        """Whether the scores are there, or will never be: reading them then says why."""
        try:
            return self.copied is None or bool(self.copied.query())
        except RuntimeError:
            return True


class Worker:
    """A device and a family loaded on it.

    Args:
        settings: What to load, and where.
        device_name: The one of the settings' devices that is meant.
        shared: Where the files are, if other workers load the same.

    Attributes:
        budget: Tokens of a pack.
        packs_ahead: Packs that are worth sending before the last one is read; 0 where the device computes in this thread.
        kept: Prefixes that the last pack left for the next one.
        last_finish: When the last pack was finished, by `time.perf_counter`; 0 before the first.
    """

    def __init__(
        self, settings: RerankSettings, device_name: str | None, shared: SharedCheckpoint | None = None
    ) -> None:
        self.device = choose_device(device_name)
        checkpoint = (SharedCheckpoint(settings) if shared is None else shared).found()
        kind = family_of(checkpoint)
        self.precision: Precision = choose_precision(settings.dtype, self.device, float16_is_safe=kind.float16_is_safe)
        dtype = self.precision.dtype
        self.family = kind.load(checkpoint, settings, self.device, dtype)
        usual = DEFAULT_BUDGET.get(self.device.type, OTHER_BUDGET)
        free = free_memory(self.device)
        fits = budget_within(usual, free, token_bytes(checkpoint.config, dtype))
        self.budget = settings.max_batch_tokens or fits
        self._full_budget = self.budget
        by_onednn = self.device.type == "cpu" and pays(dtype)
        self._rows_for: Callable[[int], int] = rows_for if by_onednn else int
        self._fitted = 0
        self.packs_ahead = 1 if self.device.type == "cuda" else 0
        self._graphs = graphs_for(self.family, checkpoint.config, self.device, dtype)
        self.kept = Prefixes()
        self.last_finish = 0.0

    def start(
        self, sequences: Sequence[TokenSequence], cutoff_layers: tuple[int, ...] = (), keep: Collection[int] = ()
    ) -> Pending:
        """Has the device compute the raw scores of one pack; does not wait for it where it computes aside.

        Args:
            sequences: The pairs.
            cutoff_layers: Layers to score after; empty for the one of the settings.
            keep: Groups whose prefixes the next pack goes on with.
        """
        kept, self.kept = self.kept, Prefixes()  # gone if this pack fails
        with torch.inference_mode():
            found = None if self._graphs is None else self._graphs.score(sequences)
            if found is None:
                pack = pack_sequences(sequences, self.device, self._rows_for, kept, keep)
                found = self.family.forward(pack, cutoff_layers)[: len(sequences)]
                self.kept = pack.carried.after
            if self.device.type != "cuda":
                return Pending(found.cpu())
            # Sent before anything else is asked of the device: who waits for this pack must not wait for the next.
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            scores = found.to("cpu", non_blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
            return Pending(scores, copied)

    def finish(self, pending: Pending) -> list[Any]:
        """Waits for the raw scores of a pack."""
        if pending.copied is not None:
            pending.copied.synchronize()
        scores: list[Any] = pending.scores.tolist()
        self._fitted += 1
        if self.budget < self._full_budget and self._fitted % PACKS_BEFORE_GROWTH == 0:
            self.budget = min(self._full_budget, self.budget + max(1, self.budget // 8))
        return scores

    def shrink(self, tokens: int) -> None:
        """Halves the budget after a pack of `tokens` did not fit."""
        self.budget = max(1, min(self.budget, tokens) // 2)
        self._fitted = 0
        release_cached_memory()


def token_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    """About what a token takes in a layer: the states around it, and those inside its feed-forward block."""
    hidden = int(config["hidden_size"])
    return (12 * hidden + 4 * int(config.get("intermediate_size") or 4 * hidden)) * dtype.itemsize


def budget_within(usual: int, free: int | None, per_token: int) -> int:
    """The usual budget, or what half of the free memory holds if that is less. `free` is None where nobody can tell."""
    return usual if free is None else min(usual, max(SMALLEST_BUDGET, free // 2 // per_token))
