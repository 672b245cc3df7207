"""Attention over a `Pack`, registered once with transformers under the name `ATTENTION`.

transformers' layers hand whatever the model call was given down to the attention function, so `model(..., pack=pack)` brings
the pack here. Three implementations of one function, chosen by the kind of device: `_attend_varlen` (CUDA, the
variable-length flash attention of torch), `_attend_segments` (CPU, one small product per segment) and `_attend_padded`
(every other device: pads inside attention and nowhere else). Knows nothing of families, text or scores.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from .packing import Pack

ATTENTION = "bge_pack"

Attend = Callable[[Tensor, Tensor, Tensor, Pack, float, bool, int | None, float | None], Tensor]
"""(query, key, value, pack, scaling, causal, window, softcap) -> output; query and output (tokens, heads, head_dim),
key and value (tokens, key_value_heads, head_dim)."""


def attend_to_pack(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    pack: Pack,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: The attention layer; its `is_causal` says whether a token sees those after it.
        query: Shape (1, heads, tokens, head_dim).
        key: Shape (1, key_value_heads, tokens, head_dim).
        value: Same shape as `key`.
        attention_mask: Always None; the pack says what attends to what.
        scaling: Factor on the products of queries and keys; by default head_dim ** -0.5.
        dropout: Ignored, this is inference.
        pack: The pack that the tokens came from.
        sliding_window: Number of latest keys that a token sees; None for all.
        softcap: Bound of the products as in Gemma 2; None for none.

    Returns:
        Output of shape (1, tokens, heads, head_dim), and None for the weights, which nobody needs.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    attend = attention_for(query.device, query.dtype, query.shape[-1])
    window = None if sliding_window is None or sliding_window >= pack.longest_k else sliding_window
    output = attend(
        rows[0], rows[1], rows[2], pack, scaling, bool(getattr(module, "is_causal", False)), window, softcap
    )
    return output[None], None


@cache
def attention_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    """The implementation for a device. CUDA needs compute capability 8.0 and half precision for the fast one."""
    if device.type == "cpu":
        return _attend_segments
    if device.type == "cuda" and _has_varlen(device, dtype, head_dim):
        return _attend_varlen
    return _attend_padded


def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:  # torch < 2.10
        return False
    half = dtype in (torch.float16, torch.bfloat16)
    return half and head_dim <= 256 and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One product per segment. SDPA is the faster one in float32 on a CPU, explicit products in bfloat16."""
    groups = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    for start, stop, prefix_start, prefix_stop in pack.segments:
        q, k, v = (states[:, start:stop] for states in (query, key, value))
        if prefix_stop > prefix_start:
            k = torch.cat([key[:, prefix_start:prefix_stop], k], dim=1)
            v = torch.cat([value[:, prefix_start:prefix_stop], v], dim=1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        mask = _visible(q.shape[1], k.shape[1], causal, window, q.device)
        if q.dtype == torch.float32 and softcap is None:
            segment = scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scaling)[0]
        else:
            segment = _explicit_attention(q, k, v, mask, scaling, softcap)
        output[start:stop] = segment.transpose(0, 1)
    return output


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    logits = torch.matmul(q * scaling, k.transpose(-2, -1))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return torch.matmul(softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype), v)


def _visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, the last query standing at the last key. Shape (queries, keys), or None for all."""
    if not causal and window is None:
        return None
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    if window is not None:
        visible &= behind.abs() < window
    return visible


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One call for the whole pack. Keys longer than queries align at the end, which is what a shared prefix needs."""
    if softcap is not None:  # the kernel has no soft cap
        return _attend_padded(query, key, value, pack, scaling, causal, window, softcap)
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if pack.key_rows is not None:
        key, value = key[pack.key_rows], value[pack.key_rows]
    behind = -1 if window is None else window - 1
    ahead = 0 if causal else behind
    output: Tensor = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        pack.cu_seqlens_q,
        pack.cu_seqlens_k,
        pack.longest_q,
        pack.longest_k,
        scale=scaling,
        window_size=(behind, ahead),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Segments padded to the longest one, for this call only. Aligned at the end, so that prefixes stand before them."""
    groups = query.shape[1] // key.shape[1]
    if pack.key_rows is not None:
        key, value = key[pack.key_rows], value[pack.key_rows]
    q_lengths = [s.stop - s.start for s in pack.segments]
    k_lengths = [s.stop - s.start + s.prefix_stop - s.prefix_start for s in pack.segments]

    def padded(states: Tensor, lengths: list[int]) -> Tensor:
        """(tokens, heads, head_dim) -> (segments, heads, longest, head_dim), filled at the front."""
        return pad_sequence(list(torch.split(states, lengths)), batch_first=True, padding_side="left").transpose(1, 2)

    q, k, v = padded(query, q_lengths), padded(key, k_lengths), padded(value, k_lengths)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = k.shape[2]
    real = torch.arange(longest, device=q.device) >= longest - torch.tensor(k_lengths, device=q.device)[:, None]
    mask = real[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    visible = _visible(q.shape[2], longest, causal, window, q.device)
    if visible is not None:
        mask = mask & visible
        # A padding query may see no key at all; its row is thrown away, but must not become NaN on the way.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    if softcap is None:
        attended = scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    else:
        attended = _explicit_attention(q, k, v, mask, scaling, softcap)
    attended = attended.transpose(1, 2)
    return torch.cat([attended[i, q.shape[2] - length :] for i, length in enumerate(q_lengths)])


def attend_from_first_rows(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float) -> Tensor:
    """Attention of the first token of each sequence alone, over its own sequence, in float32; for packs without prefixes.

    Args:
        query: Shape (sequences, heads, head_dim).
        key: Shape (tokens, heads, head_dim).
        value: Same shape as `key`.
        pack: The pack that the tokens came from.
        scaling: Factor on the products of queries and keys.

    Returns:
        Output of the shape of `query`.
    """
    lengths = pack.cu_seqlens_q.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=key.device), lengths, output_size=len(pack))
    logits = (query[sequence].float() * key.float()).sum(-1) * scaling  # (tokens, heads)
    highest = torch.full(query.shape[:2], -torch.inf, device=key.device)
    highest = highest.scatter_reduce(0, sequence[:, None].expand_as(logits), logits, "amax")
    weights = torch.exp(logits - highest[sequence])
    total = torch.zeros_like(highest).index_add(0, sequence, weights)
    summed = torch.zeros(query.shape, device=key.device).index_add(0, sequence, weights[..., None] * value.float())
    return (summed / total[..., None]).to(query.dtype)


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask function beside the attention function: without one, transformers may build a 4D mask over the pack."""


AttentionInterface.register(ATTENTION, attend_to_pack)
AttentionMaskInterface.register(ATTENTION, _no_mask)
