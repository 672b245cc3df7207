"""Attention of a segment as batched products, one matrix for each head: the fastest form in bfloat16 without AMX.

torch gives such products to oneDNN if every operand is laid out head by head, and copies those that are not; here each is
copied once, no longer than it must be. Knows nothing of families, text or packs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear import rows_for

LANES = 32
"""Numbers in bfloat16 that a register holds. Softmax over another number of keys takes up to twice as long."""

LOGITS_AT_ONCE = 1 << 21
"""Logits of some heads that are computed together, so that they stay in caches: of up to 410 tokens, twelve heads."""


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scaling: float) -> None:
    """Attention of the tokens from `start` to `stop` over one another, in place of their queries.

    The segment is widened to one of few sizes by tokens behind it, or by zeros at the end, as keys with weights of 0, whose
    values count as 0 whatever they are, and as queries whose output nobody gets: oneDNN compiles a program for every size.

    Args:
        query: Shape (tokens, heads, head_dim). Overwritten from `start` to `stop`.
        key: Same shape.
        value: Same shape.
        start: First token.
        stop: Token behind the last one.
        scaling: Factor on the products of queries and keys.
    """
    own = stop - start
    rows = rows_for(own)
    wide = -(-rows // LANES) * LANES
    q, k, v = (
        by_head(widened(states[start : start + count], count))
        for states, count in ((query, rows), (key, wide), (value, wide))
    )
    v[:, own:] = 0  # a text that makes them infinite must not be its neighbour's concern
    heads = max(1, LOGITS_AT_ONCE // (rows * wide))
    for some_q, some_k, some_v in zip(*(torch.split(states, heads) for states in (q, k, v)), strict=True):
        logits = q.new_empty(len(some_q), rows, wide)
        torch.baddbmm(logits, some_q, some_k.transpose(1, 2), beta=0, alpha=scaling, out=logits)
        logits[..., own:] = -torch.inf
        weights = torch.softmax(logits, dim=-1, out=logits)
        torch.bmm(weights, some_v, out=some_q)
    query[start:stop] = q[:, :own].transpose(0, 1)


def by_head(states: Tensor) -> Tensor:
    """(tokens, heads, head_dim) as (heads, tokens, head_dim), a copy even of a single token."""
    return states.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def widened(states: Tensor, rows: int) -> Tensor:
    """The states, with rows of zeros behind them where they have less than `rows`."""
    missing = rows - len(states)
    return states if missing == 0 else pad(states, (0, 0, 0, 0, 0, missing))
