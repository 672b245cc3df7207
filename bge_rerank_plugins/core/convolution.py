"""Attention of a segment as two convolutions of width 1, whose groups are the heads: the form in which oneDNN multiplies float32.

torch leaves float32 products on a CPU to a BLAS, and convolutions to oneDNN; where oneDNN is the faster of the two
(`linear.onednn_beats_blas`), products of queries with keys and of weights with values take 0.4 to 0.7 of their time so. Tokens
stand as pixels, as channels last: states are read and written where they are. Knows nothing of families, text or packs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from .linear import onednn_beats_blas, rows_for
from .products import by_head, widened

FEWEST_TOKENS = 96
"""A shorter segment is not worth two calls of some 30 us more."""

QUERIES_AT_ONCE = 256
"""Rows of products, so that those of 512 keys stay in caches, and of an allocator's memory."""

LANES = 16
"""Numbers that a register holds. Over keys of another multiple both products are slower."""


def convolution_pays(tokens: int, dtype: torch.dtype) -> bool:
    """Whether a segment of so many tokens on a CPU is faster this way."""
    return (
        tokens >= FEWEST_TOKENS
        and dtype == torch.float32
        and onednn_beats_blas()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
    )


def attend_by_convolution(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scaling: float) -> None:
    """Attention of the tokens from `start` to `stop` over one another, in place of their queries.

    The segment is widened as by `products.attend_by_products`, since oneDNN compiles a program for every size.

    Args:
        query: Shape (tokens, heads, head_dim), contiguous. Overwritten from `start` to `stop`.
        key: Same shape.
        value: Same shape.
        start: First token.
        stop: Token behind the last one.
        scaling: Factor on the products of queries and keys.
    """
    _, heads, head_dim = query.shape
    own = stop - start
    wide = -(-rows_for(own) // LANES) * LANES
    q, k, v = (widened(states[start : start + wide], wide) for states in (query, key, value))
    keys = torch.mul(k.transpose(0, 1), scaling, out=k.new_empty(heads, wide, head_dim)).view(-1, head_dim, 1, 1)
    values = by_head(v)
    values[:, own:] = 0
    values = values.view(-1, head_dim, 1, 1)
    for first in range(0, own, QUERIES_AT_ONCE):
        rows = q[first : first + QUERIES_AT_ONCE]
        logits = _channels(conv2d(_pixels(rows), keys, groups=heads)).view(-1, heads, wide)
        logits[..., own:] = -torch.inf
        weights = torch.softmax(logits, dim=-1, out=logits)
        attended = _channels(conv_transpose2d(_pixels(weights), values, groups=heads)).view(rows.shape)
        count = min(len(rows), own - first)
        query[start + first : start + first + count] = attended[:count]


def _pixels(states: Tensor) -> Tensor:
    """(tokens, ...) as one image of a single row, shape (1, channels, 1, tokens), channels last; a view."""
    return states.reshape(1, 1, len(states), -1).permute(0, 3, 1, 2)


def _channels(image: Tensor) -> Tensor:
    """(1, channels, 1, tokens) as (tokens, channels); a view of what is channels last."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[3], -1)
