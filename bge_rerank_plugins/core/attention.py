"""Attention over a `Pack`, registered once with transformers under the name `ATTENTION`.

transformers' layers hand whatever the model call was given down to the attention function, so `model(..., pack=pack)` brings
the pack here. Three implementations of one function, chosen by the kind of device: `_attend_varlen` (CUDA, the
variable-length flash attention of torch), `_attend_segments` (CPU, one small product per segment) and `_attend_padded`
(every other device: pads inside attention and nowhere else). Knows nothing of families, text or scores.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from .convolution import attend_by_convolution, convolution_pays
from .linear import by_onednn, rows_for
from .packing import Pack
from .products import attend_by_products

ATTENTION = "bge_pack"

Attend = Callable[[Tensor, Tensor, Tensor, Pack, float, bool, int | None, float | None], Tensor]
"""(query, key, value, pack, scaling, causal, window, softcap) -> output; query and output (tokens, heads, head_dim),
key and value (tokens and kept prefixes, key_value_heads, head_dim)."""


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
        module: The attention layer; its `is_causal` says whether a token sees those after it, its `layer_idx` which one it is.
        query: Shape (1, heads, tokens, head_dim). Overwritten on a CPU.
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
    rows[1:] = pack.carried.carry(getattr(module, "layer_idx", 0), rows[1], rows[2])
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


def is_one_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention is a single kernel that reads what it needs of a pack from the device's memory."""
    return attention_for(device, dtype, head_dim) is _attend_varlen


def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention was built into this torch, and takes this device and these states."""
    if torch.version.hip is not None:  # ROCm's kernels align the last query otherwise, or take no windows
        return False
    half = dtype in (torch.float16, torch.bfloat16)
    takes = half and head_dim <= 256 and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)
    return takes and torch.backends.cuda.is_flash_attention_available()


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
    """One product per segment, in the form that is fastest here for its precision and length.

    The output overwrites the queries, which nobody else reads: a pack's states are tens of megabytes for the system to find.
    """
    output, keys, values = query, key, value
    query, key, value = _grouped(query, key, value)
    plain = softcap is None and not causal and window is None
    own_keys = plain and keys.shape == output.shape  # as many key heads as heads, and no kept prefixes before them
    by_sdpa = softcap is None and _sdpa_is_faster(query.dtype)
    attend = _segment_by_sdpa if by_sdpa else _segment_in_steps
    widened = plain and by_sdpa and query.dtype == torch.bfloat16
    for start, stop, prefix_start, prefix_stop in pack.segments:
        in_place = _in_place_form(stop - start, query.dtype) if own_keys and prefix_start == prefix_stop else None
        if in_place is not None:
            in_place(output, keys, values, start, stop, scaling)
            continue
        q, k, v = (states[:, :, start:stop] for states in (query, key, value))
        wide = start + -(-(stop - start) // KEYS_AT_ONCE) * KEYS_AT_ONCE
        if widened and prefix_start == prefix_stop and stop < wide <= len(output) and _are_finite(values[stop:wide]):
            k, v = (states[:, :, start:wide] for states in (key, value))
            segment = _by_sdpa(q, k, v, scaling, _beyond(stop - start, wide - start, q.dtype))
        else:
            if prefix_stop > prefix_start:
                k = torch.cat([key[:, :, prefix_start:prefix_stop], k], dim=2)
                v = torch.cat([value[:, :, prefix_start:prefix_stop], v], dim=2)
            segment = attend(q, k, v, scaling, causal, window, softcap)
        output[start:stop] = segment.flatten(0, 1).transpose(0, 1)
    return output


KEYS_AT_ONCE = 32
"""Keys that AMX multiplies at a time. Over a number of them that is no multiple SDPA takes up to twice as long, so that a
segment is given some of those that stand behind it, with weights of 0."""


def _are_finite(values: Tensor) -> bool:
    """Whether a weight of 0 makes 0 of them, as it does not of infinity. Shape (tokens, heads, head_dim).

    One number of each token tells: what is not finite in a cross-encoder's states is not a number anywhere behind a norm.
    """
    return math.isfinite(values[:, 0, 0].sum().item())


@lru_cache(maxsize=1024)
def _beyond(own: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What to add to the products of keys that are not the segment's own: -infinity. Shape (1, keys)."""
    bias = torch.zeros(1, keys, dtype=dtype)
    bias[:, own:] = -torch.inf
    return bias


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views with the heads that share a key head beside each other.

    Returns:
        Queries of shape (key_value_heads, group, tokens, head_dim), keys and values of shape (key_value_heads, 1, tokens,
        head_dim).
    """
    _, kv_heads, head_dim = key.shape
    queries = query.view(len(query), kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    return queries, key.transpose(0, 1)[:, None], value.transpose(0, 1)[:, None]


def _in_place_form(tokens: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, int, int, float], None] | None:
    """What overwrites the queries of a segment that sees all of its own keys and no others, if that is faster than SDPA."""
    if convolution_pays(tokens, dtype):
        return attend_by_convolution
    return attend_by_products if dtype == torch.bfloat16 and not _sdpa_is_faster(dtype) else None


@cache
def _sdpa_is_faster(dtype: torch.dtype) -> bool:
    """In float32 always; in half precision only with AMX, which SDPA uses (measured: 2 to 4 times either way)."""
    return dtype == torch.float32 or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _segment_by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, window: int | None, softcap: float | None
) -> Tensor:
    whole = causal and window is None and q.shape[2] == k.shape[2]
    mask = None if whole else _bias(q.shape[2], k.shape[2], causal, window, q.dtype, q.device)
    return _by_sdpa(q, k, v, scaling, mask, is_causal=whole)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    if q.shape[0] == 1 or q.shape[1] > 1:
        k, v = (states.expand(-1, q.shape[1], -1, -1) for states in (k, v))
    else:  # as many key heads as heads: all in one batch
        q, k, v = (states.transpose(0, 1) for states in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scaling)


def _segment_in_steps(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, window: int | None, softcap: float | None
) -> Tensor:
    kv_heads, group, queries, head_dim = q.shape
    keys = k.shape[2]
    if by_onednn(q.dtype):  # zeros behind the last token: it keeps a program for every size
        q, k, v = (pad(states, (0, 0, 0, rows_for(states.shape[2]) - states.shape[2])) for states in (q, k, v))
    q, k, v = q.reshape(kv_heads, -1, head_dim), k[:, 0], v[:, 0]
    logits = q.new_empty(kv_heads, q.shape[1], k.shape[1])
    torch.baddbmm(logits, q, k.transpose(1, 2), beta=0, alpha=scaling, out=logits)
    logits = logits.view(kv_heads, group, -1, k.shape[1])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    bias = _bias(queries, keys, causal, window, q.dtype, q.device)
    if bias is not None:
        logits[:, :, :queries, :keys] += bias
    logits[..., keys:] = -torch.inf
    weights = torch.softmax(logits, dim=-1, out=logits)  # sums in float32, whatever it is given
    return torch.bmm(weights.flatten(1, 2), v).view(kv_heads, group, -1, head_dim)[:, :, :queries]


def _bias(
    queries: int, keys: int, causal: bool, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What to add to the products: 0 where a query sees a key, else -infinity. Shape (queries, keys), or None for nothing."""
    if causal and window is None and keys <= LARGEST_TRIANGLE:
        return _triangle(1 << (keys - 1).bit_length(), dtype, device)[keys - queries : keys, :keys]
    visible = _visible(queries, keys, causal, window, device)
    return None if visible is None else torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)


LARGEST_TRIANGLE = 2048
"""Keys up to which the causal bias is kept rather than made for every segment of every layer: 16 MB in float32."""


@lru_cache(maxsize=8)
def _triangle(keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((keys, keys), -torch.inf, dtype=dtype, device=device).triu_(1)


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
    if pack.key_rows is not None:
        key, value = key[pack.key_rows], value[pack.key_rows]
    behind = -1 if window is None else window - 1
    ahead = 0 if causal else behind
    bounds = pack.cu_seqlens_q, pack.cu_seqlens_k, pack.longest_q, pack.longest_k
    return _by_kernel(query, key, value, *bounds, scaling, (behind, ahead))


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    scaling: float,
    window: tuple[int, int],
) -> Tensor:
    """The kernel's output, in one pass over the keys of each query, so that it does not depend on what shares the pack.

    Where it may split the keys, torch from 2.14 on takes cuDNN's kernel on some GPUs, which plans anew for every size.
    """
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    options = {"enable_gqa": query.shape[1] != key.shape[1], "num_splits": 1}  # torch 2.11 takes groups unasked
    output: Tensor = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cu_seqlens_q,
        cu_seqlens_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=window,
        **{name: value for name, value in options.items() if name in _parameters_of(varlen_attn)},
    )
    return output


@cache
def _parameters_of(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


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
    q_lengths = [segment.queries for segment in pack.segments]
    k_lengths = [segment.keys for segment in pack.segments]

    def padded(states: Tensor, lengths: list[int]) -> Tensor:
        """(tokens, heads, head_dim) -> (segments, heads, longest, head_dim), filled at the front."""
        return pad_sequence(list(torch.split(states, lengths)), batch_first=True, padding_side="left").transpose(1, 2)

    q, k, v = padded(query, q_lengths), padded(key, k_lengths), padded(value, k_lengths)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = k.shape[2]
    real = torch.arange(longest, device=q.device) >= longest - pack.cu_seqlens_k.diff()[:, None]
    mask = real[:, None, None, :]
    visible = _visible(q.shape[2], longest, causal, window, q.device)
    if visible is not None:
        mask = mask & visible
        # A padding query may see no key at all; its row is thrown away, but must not become NaN on the way.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    if softcap is None:
        attended = scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    else:
        attended = _softcapped_attention(q, k, v, mask, scaling, softcap)
    attended = attended.transpose(1, 2)
    return torch.cat([attended[i, q.shape[2] - length :] for i, length in enumerate(q_lengths)])


def _softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    logits = torch.tanh(torch.matmul(q * scaling, k.transpose(-2, -1)) / softcap) * softcap
    weights = softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(v.dtype), v)


def attend_from_first_rows(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float) -> Tensor:
    """Attention of the first token of each sequence alone, over its own sequence; for packs without prefixes.

    In float32 where there is no kernel for it.

    Args:
        query: Shape (sequences, heads, head_dim).
        key: Shape (tokens, heads, head_dim).
        value: Same shape as `key`.
        pack: The pack that the tokens came from.
        scaling: Factor on the products of queries and keys.

    Returns:
        Output of the shape of `query`.
    """
    if is_one_kernel(key.device, key.dtype, key.shape[-1]):
        rows = torch.arange(len(query) + 1, dtype=torch.int32, device=key.device)
        return _by_kernel(query, key, value, rows, pack.cu_seqlens_k, 1, pack.longest_k, scaling, (-1, -1))
    lengths = pack.cu_seqlens_q.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=key.device), lengths, output_size=len(pack))
    logits = (query[sequence].float() * key.float()).sum(-1) * scaling  # (tokens, heads)
    # float32 by name: while another model loads, transformers changes the default of the whole process.
    highest = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=key.device)
    highest = highest.scatter_reduce(0, sequence[:, None].expand_as(logits), logits, "amax")
    weights = torch.exp(logits - highest[sequence])
    total = torch.zeros_like(highest).index_add(0, sequence, weights)
    summed = torch.zeros(query.shape, dtype=torch.float32, device=key.device)
    summed = summed.index_add(0, sequence, weights[..., None] * value.float())
    return (summed / total[..., None]).to(query.dtype)


AttentionInterface.register(ATTENTION, attend_to_pack)
# No mask function of that name: with one, transformers looks through the positions for packs of its own kind before it asks for
# a mask, and waits for the device to do so.
