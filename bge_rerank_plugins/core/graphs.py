"""Small packs of cross-encoders on CUDA, replayed as graphs: one launch instead of one for every kernel of every layer.

A graph computes on a buffer that never moves, so a pack is filled up to one of few sizes and its numbers are copied there. It
is captured when a pack of its size first comes, and compared with the plain forward pass on that pack, not filled up. Where it
differs, or captures fail again and again, there are no graphs any more. All but capture and replay is the same on a CPU, where
the tests run it. Knows nothing of requests or text.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention import is_one_kernel
from .packing import Pack, Segment, pack_sequences
from .sequences import TokenSequence

if TYPE_CHECKING:
    from .families import Family

logger = logging.getLogger("bge_rerank_plugins")

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, *range(2048, 8193, 512))
"""Tokens of the packs that have a graph. To launch the kernels of 24 layers takes Python about 6 ms (measured on a CPU, with tiny
tensors); a large GPU computes some 7,000 tokens of bge-reranker-v2-m3 in that time, and is kept busy by larger packs without."""

SEQUENCES = 128
"""Sequences that a graph has room for."""

TOLERANCE = 0.2
"""How far a graph's scores may be from the plain ones: of the largest of them, or of 1 where none is larger, since a score may
lie near 0. Half precision rounds packs of other sizes otherwise, by some hundredths in checkpoints with wide weights; what is
wrong with a graph is wrong by far."""

ATTEMPTS = 3
"""Captures that may fail before there are no graphs any more: what another thread asks of the device can end one."""

Run = Callable[[Tensor], Tensor]
"""From the numbers of a pack, in one buffer, to its scores."""


def graphs_for(family: Family, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Graphs | None:
    """Graphs where they can be used: a cross-encoder, whose packs have no prefixes, with attention in one kernel."""
    if device.type != "cuda" or family.name != "encoder":
        return None
    head_dim = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return Graphs(family, device, _Recorder(device)) if is_one_kernel(device, dtype, head_dim) else None


class Graphs:
    """The graphs of one loaded cross-encoder.

    Args:
        family: The cross-encoder.
        device: Where it is.
        record: Makes of a computation on a buffer, and that buffer, something that repeats it.
    """

    def __init__(self, family: Family, device: torch.device, record: Callable[[Run, Tensor], Run]) -> None:
        self._family = family
        self._device = device
        self._record = record
        self._longest = min(family.max_length, SIZES[-1])
        self._segments: tuple[Segment, ...] = ()
        self._replays: dict[int, tuple[Tensor, Run]] = {}
        self._attempts_left = ATTEMPTS

    def score(self, sequences: Sequence[TokenSequence]) -> Tensor | None:
        """Raw scores of a pack, shape (sequences,); None if it is none for a graph."""
        tokens = sum(map(len, sequences))
        if not self._attempts_left or tokens > SIZES[-1]:
            return None
        size = SIZES[bisect_left(SIZES, tokens)]
        filled = [*sequences, *self._fillers(size - tokens)]
        if len(filled) > SEQUENCES:
            return None
        pack = pack_sequences(filled)
        self._segments = pack.segments
        numbers = _numbers_of(pack, size)
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        if size not in self._replays and not self._capture(size, numbers, sequences):
            return None
        buffer, replay = self._replays[size]
        buffer.copy_(numbers, non_blocking=True)
        return replay(buffer)[: len(sequences)]

    def _fillers(self, missing: int) -> Iterator[TokenSequence]:
        while missing > 0:
            length = min(missing, self._longest)
            yield TokenSequence([0] * length, position_ids=[0] * length)
            missing -= length

    def _capture(self, size: int, numbers: Tensor, sequences: Sequence[TokenSequence]) -> bool:
        """Captures the graph of a size; whether it computes what the plain forward pass does."""
        # An error of the model's own is no reason to give graphs up.
        expected = self._family.forward(pack_sequences(sequences, self._device))
        buffer = numbers.to(self._device)

        def run(numbers: Tensor) -> Tensor:
            return self._family.forward(self._pack(numbers, size))

        try:
            replay = self._record(run, buffer)
            got = replay(buffer)[: len(sequences)]
            difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
        except RuntimeError as error:  # which torch's CUDA errors are
            self._attempts_left -= 1
            if not self._attempts_left:
                self._give_up(error)
            return False
        if not difference <= TOLERANCE:
            self._give_up(ValueError(f"its scores are off by {difference:.2g} of the largest"))
            return False
        self._replays[size] = buffer, replay
        return True

    def _give_up(self, why: Exception) -> None:
        logger.warning("no CUDA graphs, small packs take longer: %s", why, exc_info=why)
        self._attempts_left = 0
        self._replays.clear()

    def _pack(self, numbers: Tensor, size: int) -> Pack:
        """The pack whose numbers stand in a buffer. No size in it depends on them, and nothing waits for the device."""
        ids, positions, types, first_rows, last_rows, bounds = torch.split(
            numbers, [size, size, size, SEQUENCES, SEQUENCES, SEQUENCES + 1]
        )
        cu_seqlens = bounds.to(torch.int32)
        return Pack(
            input_ids=ids,
            position_ids=positions,
            token_type_ids=types,
            segments=self._segments,
            first_rows=first_rows,
            last_rows=last_rows,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            key_rows=None,
            longest_q=min(size, self._longest),
            longest_k=min(size, self._longest),
        )


def _numbers_of(pack: Pack, size: int) -> Tensor:
    """All that a forward pass reads of a pack, in one tensor. Sequences that are not there are empty and stand at the end."""
    missing = SEQUENCES - len(pack.first_rows)
    types = torch.zeros_like(pack.input_ids) if pack.token_type_ids is None else pack.token_type_ids
    return torch.cat(
        [
            pack.input_ids,
            pack.position_ids,
            types,
            pad(pack.first_rows, (0, missing)),
            pad(pack.last_rows, (0, missing)),
            pad(pack.cu_seqlens_q.to(torch.int64), (0, missing), value=size),
        ]
    )


class _Recorder:
    """Captures a device's CUDA graphs, which share their memory: they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Unless it is given one, torch captures on a stream of the device that captured first.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Run, buffer: Tensor) -> Run:
        with _one_capture_at_a_time, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # what libraries set up at first use must not be captured
                run(buffer)
                run(buffer)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    scores = run(buffer)
            except BaseException:
                torch.cuda.set_stream(current)  # where a capture cannot be ended, torch leaves the thread on its stream
                raise

        def replay(_: Tensor) -> Tensor:
            graph.replay()
            return scores

        return replay


_one_capture_at_a_time = threading.Lock()
"""torch allows no more in a process, and every device's worker captures in a thread of its own."""
