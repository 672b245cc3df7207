"""The implementations of attention over packs are one function. The CUDA kernel is checked where there is a CUDA device;
its arguments, everywhere, against a plain implementation of the kernel's contract."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bge_rerank_plugins.core import attention, convolution, products
from bge_rerank_plugins.core.packing import Pack, pack_sequences
from bge_rerank_plugins.core.sequences import TokenSequence

SHARED = pack_sequences(
    [
        TokenSequence(list(range(9)), prefix=4, group=1),
        TokenSequence(list(range(6)), prefix=4, group=1),
        TokenSequence(list(range(5))),
        TokenSequence(list(range(12)), prefix=3, group=2),
        TokenSequence(list(range(4)), prefix=3, group=2),
    ]
)
UNSHARED = pack_sequences([TokenSequence(list(range(n))) for n in (5, 1, 17, 8)])
LONG = pack_sequences([TokenSequence(list(range(n))) for n in (40, 3, 64, 33, 1, 47, 9)])
CASES = [
    pytest.param(UNSHARED, False, None, None, id="encoder"),
    pytest.param(LONG, False, None, None, id="long"),
    pytest.param(UNSHARED, True, None, None, id="causal"),
    pytest.param(SHARED, True, None, None, id="shared-prefix"),
    pytest.param(SHARED, True, 3, None, id="sliding-window"),
    pytest.param(UNSHARED, False, 3, None, id="two-sided-window"),
    pytest.param(SHARED, True, None, 2.0, id="softcap"),
]


def states(pack: Pack, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(pack), n, 8, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))


def plain(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, causal: bool, window: int | None, softcap: float | None
) -> Tensor:
    """Attention row by row and head by head, in float64, from its definition."""
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros_like(query)
    per_key_head = query.shape[1] // key.shape[1]
    for start, stop, prefix_start, prefix_stop in pack.segments:
        rows = [*range(prefix_start, prefix_stop), *range(start, stop)]
        for row in range(start, stop):
            place = len(rows) - (stop - row)
            for head in range(query.shape[1]):
                logits = key[rows, head // per_key_head] @ query[row, head] * 8**-0.5
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                distance = place - torch.arange(len(rows))
                if causal:
                    logits[distance < 0] = -torch.inf
                if window is not None:
                    logits[distance.abs() >= window] = -torch.inf
                output[row, head] = torch.softmax(logits, 0) @ value[rows, head // per_key_head]
    return output


@pytest.mark.parametrize(
    ("name", "sdpa", "in_place"),
    [
        ("_attend_segments", True, None),
        ("_attend_segments", False, None),
        ("_attend_segments", True, convolution.attend_by_convolution),
        ("_attend_segments", False, products.attend_by_products),
        ("_attend_padded", True, None),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("pack", "causal", "window", "softcap"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_every_implementation_is_plain_attention(
    name: str,
    sdpa: bool,
    in_place: Callable[..., None] | None,
    kv_heads: int,
    pack: Pack,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_sdpa_is_faster", lambda dtype: sdpa)  # what the processor says, not what is tested
    monkeypatch.setattr(attention, "_in_place_form", lambda tokens, dtype: in_place)
    query, key, value = states(pack, dtype, kv_heads=kv_heads)
    want = plain(query, key, value, pack, causal, window, softcap)
    got = getattr(attention, name)(query, key, value, pack, 8**-0.5, causal, window, softcap)
    assert got.dtype == dtype
    assert (got.data_ptr() == query.data_ptr()) == (name == "_attend_segments"), "over the queries, or not"
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attend", [convolution.attend_by_convolution, products.attend_by_products])
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    at_once=st.sampled_from([7, 32, 256]),
    seed=st.integers(0, 2**16),
)
def test_attention_in_place_is_plain_attention_and_leaves_its_neighbours_alone(
    attend: Callable[..., None], lengths: list[int], at_once: int, seed: int
) -> None:
    """Wherever the segment stands, its last tokens among them, and however its queries or heads are divided."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(sum(lengths), 3, 8, generator=generator) for _ in range(3))
    pack = pack_sequences([TokenSequence(list(range(n))) for n in lengths])
    want, before = plain(query, key, value, pack, False, None, None), query.clone()
    chosen = pack.segments[seed % len(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "QUERIES_AT_ONCE", at_once)
        patch.setattr(products, "LOGITS_AT_ONCE", at_once * 96)
        attend(query, key, value, chosen.start, chosen.stop, 8**-0.5)
    own = slice(chosen.start, chosen.stop)
    torch.testing.assert_close(query[own].double(), want[own], atol=1e-5, rtol=1e-5)
    before[own] = query[own]
    assert torch.equal(query, before)


@pytest.mark.parametrize(
    ("dtype", "sdpa", "in_place"),
    [
        (torch.bfloat16, True, None),
        (torch.bfloat16, False, products.attend_by_products),
        (torch.bfloat16, False, None),
        (torch.float32, True, convolution.attend_by_convolution),
        (torch.float32, True, None),
    ],
)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_segment_that_is_not_finite_is_not_its_neighbours_concern(
    dtype: torch.dtype, sdpa: bool, in_place: Any, broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_sdpa_is_faster", lambda dtype: sdpa)
    monkeypatch.setattr(attention, "_in_place_form", lambda tokens, dtype: in_place)
    want = plain(*states(LONG, dtype, kv_heads=4), LONG, False, None, None)
    query, key, value = states(LONG, dtype, kv_heads=4)
    for segment in LONG.segments[1::2]:
        rows = slice(segment.start, segment.stop)
        query[rows] = key[rows] = value[rows] = want[rows] = broken
    got = attention._attend_segments(query, key, value, LONG, 8**-0.5, False, None, None)
    sound = torch.isfinite(want)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got[sound].double(), want[sound], atol=tolerance, rtol=tolerance)
    assert not got[~sound].isfinite().any()


@pytest.mark.parametrize(
    ("tokens", "dtype", "faster", "enabled", "pays"),
    [
        (96, torch.float32, True, True, True),
        (95, torch.float32, True, True, False),
        (96, torch.bfloat16, True, True, False),
        (96, torch.float32, False, True, False),
        (96, torch.float32, True, False, False),
    ],
)
def test_convolutions_are_for_long_segments_in_float32_where_oneDNN_is_the_faster(
    tokens: int, dtype: torch.dtype, faster: bool, enabled: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "onednn_beats_blas", lambda: faster)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    assert convolution.convolution_pays(tokens, dtype) == pays


@pytest.mark.parametrize(
    ("dtype", "amx", "form"),
    [
        (torch.bfloat16, False, products.attend_by_products),
        (torch.bfloat16, True, None),
        (torch.float16, False, None),  # a state may be infinite there, and a weight of 0 makes it no number
    ],
)
def test_products_head_by_head_are_for_bfloat16_without_amx(
    dtype: torch.dtype, amx: bool, form: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(attention, "_sdpa_is_faster", attention._sdpa_is_faster.__wrapped__)  # asks each time
    assert attention._in_place_form(300, dtype) is form


@pytest.mark.parametrize(("causal", "kv_heads"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_many_lengths_have_few_sizes_in_half_precision(
    dtype: torch.dtype, causal: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each of which oneDNN keeps a program: 70 MB of them for 64 sizes, 1.2 GB for 493."""
    sizes = set()
    multiply = torch.bmm

    def seen(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        sizes.add((left.shape, right.shape))
        return multiply(left, right, **options)

    monkeypatch.setattr(torch, "bmm", seen)
    monkeypatch.setattr(attention, "_sdpa_is_faster", lambda dtype: False)
    for tokens in range(1, 513):
        pack = pack_sequences([TokenSequence([0] * tokens)])
        query, key, value = states(pack, dtype, heads=2, kv_heads=kv_heads)
        attention._attend_segments(query, key, value, pack, 8**-0.5, causal, None, None)
    assert 0 < len(sizes) <= 2 * 64


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_from_the_first_rows_alone_is_that_of_the_whole_pack(
    dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:
        install(varlen_by_contract, monkeypatch)
        monkeypatch.setattr(attention, "attention_for", lambda *_: attention._attend_varlen)
    query, key, value = states(UNSHARED, dtype, heads=4, kv_heads=4)
    got = attention.attend_from_first_rows(query[UNSHARED.first_rows], key, value, UNSHARED, 8**-0.5)
    want = plain(query, key, value, UNSHARED, False, None, None)[UNSHARED.first_rows]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def varlen_by_contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` promises: a window of (left, right) keys around each query, the last
    query aligned with the last key."""
    assert num_splits == 1, "what shares a pack would change the order of sums"
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q, k, v = query[cu_seq_q[i] : cu_seq_q[i + 1]], *(x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        left, right = window_size
        seen = torch.ones_like(behind, dtype=torch.bool)
        if left >= 0:
            seen &= behind <= left
        if right >= 0:
            seen &= -behind <= right
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def earlier_varlen(*states_and_bounds: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """The same as torch 2.11 has it, which takes fewer key heads than heads without a word."""
    return varlen_by_contract(*states_and_bounds, scale=scale, window_size=window_size, enable_gqa=True, num_splits=1)


def install(varlen_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = types.ModuleType("torch.nn.attention.varlen")
    kernel.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernel)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("varlen_attn", [varlen_by_contract, earlier_varlen])
@pytest.mark.parametrize(("pack", "causal", "window", "softcap"), CASES)
def test_the_cuda_call_asks_the_kernel_for_plain_attention(
    pack: Pack,
    causal: bool,
    window: int | None,
    softcap: float | None,
    varlen_attn: Any,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(varlen_attn, monkeypatch)
    query, key, value = states(pack, kv_heads=kv_heads)
    got = attention._attend_varlen(query, key, value, pack, 8**-0.5, causal, window, softcap)
    torch.testing.assert_close(
        got.double(), plain(query, key, value, pack, causal, window, softcap), atol=1e-5, rtol=1e-5
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel itself runs on CUDA only")
@pytest.mark.parametrize(("pack", "causal", "window", "softcap"), CASES)
def test_the_cuda_kernel_is_plain_attention(
    pack: Pack, causal: bool, window: int | None, softcap: float | None
) -> None:
    query, key, value = states(pack, torch.bfloat16)
    on_device = pack_to_cuda(pack)
    got = attention._attend_varlen(query.cuda(), key.cuda(), value.cuda(), on_device, 8**-0.5, causal, window, softcap)
    want = plain(query, key, value, pack, causal, window, softcap)
    torch.testing.assert_close(got.cpu().double(), want, atol=4e-2, rtol=4e-2)


def pack_to_cuda(pack: Pack) -> Pack:
    moved = {
        name: getattr(pack, name).cuda() if isinstance(getattr(pack, name), Tensor) else getattr(pack, name)
        for name in pack.__slots__
    }
    return Pack(**moved)


def test_the_kernel_accepts_the_arguments_that_the_cuda_call_gives() -> None:
    """The contract above is ours; the installed torch must know the same argument names."""
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = set(inspect.signature(varlen.varlen_attn).parameters)
    assert {"scale", "window_size"} <= known
    positional = list(inspect.signature(varlen.varlen_attn).parameters)[:7]
    assert positional == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cpu", torch.float32, 64, "_attend_segments"),
        ("cpu", torch.bfloat16, 64, "_attend_segments"),
        ("meta", torch.float32, 64, "_attend_padded"),
    ],
)
def test_the_kind_of_device_chooses_the_implementation(
    device: str, dtype: torch.dtype, head_dim: int, expected: str
) -> None:
    assert attention.attention_for(torch.device(device), dtype, head_dim).__name__ == expected


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "head_dim", "expected"),
    [
        ((9, 0), True, torch.bfloat16, 64, "_attend_varlen"),
        ((9, 0), False, torch.bfloat16, 64, "_attend_padded"),
        ((9, 0), True, torch.float32, 64, "_attend_padded"),
        ((9, 0), True, torch.bfloat16, 512, "_attend_padded"),
        ((7, 5), True, torch.float16, 64, "_attend_padded"),
    ],
)
def test_a_cuda_device_without_the_kernel_pads_inside_attention(
    capability: tuple[int, int],
    built: bool,
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    attention.attention_for.cache_clear()
    try:
        assert attention.attention_for(torch.device("cuda:0"), dtype, head_dim).__name__ == expected
    finally:
        attention.attention_for.cache_clear()


def test_rocm_pads_inside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are others under the same name: some take no windows, some align queries and keys at the start."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    attention.attention_for.cache_clear()
    try:
        assert attention.attention_for(torch.device("cuda:0"), torch.bfloat16, 64).__name__ == "_attend_padded"
    finally:
        attention.attention_for.cache_clear()
