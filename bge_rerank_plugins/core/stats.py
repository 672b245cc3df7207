"""What an engine counts, and how that is shown to users. Light to import: a scorer that has no engine yet shows it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass
class EngineStats:
    """Counters of an engine.

    Attributes:
        requests: Calls.
        pairs: Pairs that were scored.
        tokens: Their tokens, shared prefixes counted for each.
        packs: Packs that were computed.
        fill: Sum over the packs of the share of the budget that their tokens are, shared prefixes counted once.
        out_of_memory: Packs that did not fit and were tried again.
        truncated: Passages that were cut to fit.
        queued_tokens: Tokens that wait.
        device_seconds: Time spent computing, summed over the devices.
    """

    requests: int = 0
    pairs: int = 0
    tokens: int = 0
    packs: int = 0
    fill: float = 0.0
    out_of_memory: int = 0
    truncated: int = 0
    queued_tokens: int = 0
    device_seconds: float = 0.0

    def count_pack(self, tokens: Sequence[int], *, fill: float, seconds: float) -> None:
        """Adds a pack that was computed.

        Args:
            tokens: Tokens of each of its pairs.
            fill: Share of the budget that was used.
            seconds: How long the device took.
        """
        self.packs += 1
        self.pairs += len(tokens)
        self.tokens += sum(tokens)
        self.fill += fill
        self.device_seconds += seconds

    def shown(self) -> dict[str, float]:
        """The counters by name, the fill as `mean_fill` of a pack."""
        counters = asdict(self) | {"fill": self.fill / max(1, self.packs)}
        return {"mean_fill" if name == "fill" else name: value for name, value in counters.items()}
