"""Packs: end to end, never padded, prefixes once."""

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_plugins.core.packing import pack_sequences
from bge_rerank_plugins.core.prefixes import Prefixes
from bge_rerank_plugins.core.sequences import TokenSequence, computed_tokens

ids = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@given(st.lists(ids, min_size=1, max_size=8))
def test_a_pack_holds_the_tokens_of_its_sequences_and_not_one_more(sequences: list[list[int]]) -> None:
    pack = pack_sequences([TokenSequence(s) for s in sequences])
    assert pack.input_ids.tolist() == [token for s in sequences for token in s]
    assert pack.position_ids.tolist() == [position for s in sequences for position in range(len(s))]
    assert pack.input_ids[pack.first_rows].tolist() == [s[0] for s in sequences]
    assert pack.input_ids[pack.last_rows].tolist() == [s[-1] for s in sequences]
    assert pack.cu_seqlens_q.diff().tolist() == [len(s) for s in sequences]
    assert torch.equal(pack.cu_seqlens_q, pack.cu_seqlens_k)
    assert pack.key_rows is None
    assert pack.longest_q == pack.longest_k == max(map(len, sequences))


def test_sequences_have_one_key_exactly_if_they_are_alike_to_a_model() -> None:
    different = [
        TokenSequence([1, 2]),
        TokenSequence([2, 1]),
        TokenSequence([1, 2, 0, 0]),
        TokenSequence([1, 2], token_type_ids=[0, 0]),
        TokenSequence([1, 2], position_ids=[0, 0]),
        TokenSequence([1, 2], token_type_ids=[0, 1]),
    ]
    assert len({sequence.key for sequence in different}) == len(different)
    assert TokenSequence([1, 2], prefix=1, group=3, truncated=True).key == different[0].key


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_shared_prefix_stands_once_and_every_sequence_reads_its_own_keys(
    requests: list[tuple[list[int], list[list[int]]]],
) -> None:
    sequences = [
        TokenSequence([*prefix, *rest], prefix=len(prefix), group=group)
        for group, (prefix, rests) in enumerate(requests)
        for rest in rests
    ]
    pack = pack_sequences(sequences)
    assert len(pack) == sum(len(prefix) + sum(map(len, rests)) for prefix, rests in requests)
    assert len(pack) == computed_tokens(sequences)
    assert computed_tokens(sequences, kept=[0]) == len(pack) - len(requests[0][0])
    assert pack.key_rows is not None
    keys = [
        rows.tolist() for rows in pack.input_ids[pack.key_rows].split(pack.cu_seqlens_k.diff().tolist())
    ]  # of every segment, prefixes included
    segments_with_score = [keys[i] for i, s in enumerate(pack.segments) if s.stop - 1 in pack.last_rows.tolist()]
    assert segments_with_score == [s.input_ids for s in sequences]
    assert pack.input_ids[pack.last_rows].tolist() == [s.input_ids[-1] for s in sequences]
    assert pack.input_ids[pack.first_rows].tolist() == [s.input_ids[0] for s in sequences]


@given(st.lists(ids, min_size=1, max_size=8), st.integers(0, 20))
def test_what_fills_a_pack_up_stands_behind_all_others_as_a_sequence_of_its_own(
    sequences: list[list[int]], missing: int
) -> None:
    alone = pack_sequences([TokenSequence(s) for s in sequences])
    filled = pack_sequences([TokenSequence(s) for s in sequences], rows_for=lambda rows: rows + missing)
    assert len(filled) == len(alone) + missing
    for name in ("input_ids", "position_ids", "first_rows", "last_rows", "cu_seqlens_q"):
        kept = getattr(filled, name)[: len(getattr(alone, name))]
        assert torch.equal(kept, getattr(alone, name))
    assert filled.segments[: len(sequences)] == alone.segments
    assert len(filled.segments) == len(sequences) + bool(missing)
    assert not filled.position_ids[len(alone) :].any(), "a position that a model may not have"


requests_in_packs = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=6)), min_size=1, max_size=3)


@given(requests_in_packs, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_sequence_reads_its_own_keys_wherever_its_prefix_was_computed(
    requests: list[tuple[list[int], list[list[int]]]], at_once: int, random: Random
) -> None:
    """In packs that follow one another, ids standing in for keys: a prefix is computed in the first that needs it."""
    sequences = [
        TokenSequence([*prefix, *rest], prefix=len(prefix), group=group)
        for group, (prefix, rests) in enumerate(requests)
        for rest in rests
    ]
    random.shuffle(sequences)
    packs = [sequences[start : start + at_once] for start in range(0, len(sequences), at_once)]
    kept, computed = Prefixes(), 0
    for number, laid in enumerate(packs):
        later = {sequence.group for others in packs[number + 1 :] for sequence in others}
        before = list(kept)
        pack = pack_sequences(laid, kept=kept, keep=later)
        assert len(pack) == computed_tokens(laid, before)
        keys, _ = pack.carried.carry(0, pack.input_ids, pack.input_ids)
        kept = pack.carried.after
        assert set(kept) == {group for group in later if group in before or group in {s.group for s in laid}}
        assert pack.key_rows is not None
        counts = pack.cu_seqlens_k.diff().tolist()
        assert (pack.longest_q, pack.longest_k) == (int(pack.cu_seqlens_q.diff().max()), max(counts))
        of_segments = zip(pack.segments, keys[pack.key_rows].split(counts), strict=True)
        read = [rows.tolist() for segment, rows in of_segments if segment.stop - 1 in pack.last_rows.tolist()]
        assert read == [sequence.input_ids for sequence in laid]
        computed += len(pack)
    assert computed == sum(len(prefix) + sum(map(len, rests)) for prefix, rests in requests)


def test_positions_and_segments_given_by_the_family_are_kept() -> None:
    pack = pack_sequences([TokenSequence([5, 6], token_type_ids=[0, 1], position_ids=[0, -1]), TokenSequence([7])])
    assert pack.position_ids.tolist() == [0, -1, 0]
    assert pack.token_type_ids is not None
    assert pack.token_type_ids.tolist() == [0, 1, 0]
