"""Weights from a file to buffers: read, checked and sent by threads, arranged by the device where it can.

Many types lie on the device as ggml's own blocks do (``layout``), and of most others a GPU changes the order
itself (``reorder``). Of these a thread reads a little into memory that stays in its core's cache, looks at
the scales and copies it to shared memory (``staging``), which may be too slow to be read again. So a byte
leaves main memory once and crosses to the device once. Other types are arranged from packed arrays.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS, SCALE_NAMES
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.source import READ_THREADS, BlockSource, nonfinite_error
from qwen3_moe_jax.convert.unpack import (
    Nonfinite,
    aligned_empty,
    find_nonfinite,
    find_nonfinite_blocks,
    pack,
)
from qwen3_moe_jax.wgpu_backend.device import UPLOAD_PIECE, Device
from qwen3_moe_jax.wgpu_backend.layout import device_nbytes, device_words, granule
from qwen3_moe_jax.wgpu_backend.reorder import PARAMS_NBYTES, Reorder, can_reorder
from qwen3_moe_jax.wgpu_backend.staging import Staging

AHEAD = 4
"""Pieces that the device copies, beside those that threads fill."""

IN_CACHE = 1 << 20
"""Bytes that a thread reads, checks and copies at a time: no more than a core's second cache holds."""

AS_IN_THE_FILE = frozenset({GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.F32, GGMLType.F16, GGMLType.BF16})
"""Types whose blocks a buffer holds byte for byte."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a tensor and where they go.

    Attributes:
      path: of the parameter.
      first, count: the rows, experts one after the other.
      buffer: a buffer of the device.
      offset: in it, in bytes.
    """

    path: str
    first: int
    count: int
    buffer: object
    offset: int


def write_all(
    device: Device, source: BlockSource, wanted: Sequence[Rows], reorder: Reorder | None = None
) -> Iterator[int]:
    """Writes them side by side; yields bytes of the file that have been sent, in the order of ``wanted``.

    Args:
      device: whose buffers are written.
      source: an open file.
      wanted: what goes where.
      reorder: changes the order of bytes on the device; None leaves that to threads of the host.

    Raises:
      ModelFileError: as ``source.tensor``, for the first fault in the order of ``wanted``.
    """
    parts = [piece for rows in wanted for piece in pieces(source, rows)]
    largest = max((_room(source, piece) for piece in parts), default=16)
    if reorder is not None:
        reorder.prepare({source.types[rows.path] for rows in wanted}, largest)
    with (
        Staging(device, READ_THREADS + AHEAD, largest + PARAMS_NBYTES) as staging,
        ThreadPoolExecutor(READ_THREADS, thread_name_prefix="load") as pool,
    ):
        send = _Sender(source, staging, reorder, in_place=device.report.software)
        waiting: deque[tuple[Rows, Future[None]]] = deque()
        left = iter(parts)
        try:
            while True:
                while len(waiting) < READ_THREADS + AHEAD and (piece := next(left, None)) is not None:
                    waiting.append((piece, pool.submit(send, piece)))
                if not waiting:
                    return
                piece, future = waiting.popleft()
                future.result()
                yield piece.count * _row_nbytes(source, piece.path)
        finally:
            for _, future in waiting:
                future.cancel()


class _Sender:
    """Takes rows from the file to the device; called by several threads at once."""

    def __init__(self, source: BlockSource, staging: Staging, reorder: Reorder | None, *, in_place: bool):
        self._source = source
        self._staging = staging
        self._reorder = reorder
        self._memory = None if in_place else self._own_memory
        self._scratch = threading.local()

    def __call__(self, rows: Rows) -> None:
        kind, nbytes = self._source.types[rows.path], _room(self._source, rows)
        reorder = self._reorder if kind not in AS_IN_THE_FILE and can_reorder(kind) else None
        piece = self._staging.take()
        try:
            if reorder is not None or kind in AS_IN_THE_FILE:
                fill_with_blocks(self._source, rows, piece.bytes, self._memory)
            else:
                np.copyto(piece.bytes[:nbytes], words_of(self._source, rows))
        except BaseException:
            self._staging.give_back(piece)
            raise
        if reorder is not None:
            self._staging.send(piece, *reorder.orders(kind, piece, nbytes, rows.buffer, rows.offset))
        else:
            self._staging.send(piece, [(0, rows.buffer, rows.offset, nbytes)])

    def _own_memory(self, nbytes: int) -> np.ndarray:
        """This thread's own, kept from piece to piece."""
        found = getattr(self._scratch, "memory", None)
        if found is None or found.size < nbytes:
            found = self._scratch.memory = aligned_empty((max(nbytes, IN_CACHE),), np.uint8)
        return found[:nbytes]


def _columns(source: BlockSource, path: str) -> int:
    return source.specs[path].shape[-1]


def _row_nbytes(source: BlockSource, path: str) -> int:
    return FORMATS[source.types[path]].block.row_nbytes(_columns(source, path))


def _room(source: BlockSource, rows: Rows) -> int:
    """Bytes of rows on the device."""
    return device_nbytes(source.types[rows.path], rows.count * _columns(source, rows.path))


def pieces(source: BlockSource, rows: Rows) -> Iterator[Rows]:
    """Rows in pieces of about UPLOAD_PIECE bytes that begin on a vector."""
    kind, columns = source.types[rows.path], _columns(source, rows.path)
    stride = granule(kind, columns)
    stride *= max(1, UPLOAD_PIECE // device_nbytes(kind, stride * columns))
    for first in range(0, rows.count, stride):
        count = min(stride, rows.count - first)
        offset = rows.offset + device_nbytes(kind, first * columns)
        yield Rows(rows.path, rows.first + first, count, rows.buffer, offset)


def fill_with_blocks(
    source: BlockSource, rows: Rows, shared: np.ndarray, memory: Callable[[int], np.ndarray] | None
) -> None:
    """Copies rows as the file has them, with zeros up to the size that they have on the device.

    Args:
      source: an open file.
      rows: which.
      shared: uint8; where there is other ``memory`` it is written once, in order, and not read.
      memory: gives room for so many bytes; None where shared memory is as good as any.

    Raises:
      ModelFileError: as ``source.tensor``.
    """
    kind, nbytes = source.types[rows.path], _row_nbytes(source, rows.path)
    stride = max(1, IN_CACHE // nbytes)
    for first in range(0, rows.count, stride):
        count = min(stride, rows.count - first)
        part = Rows(rows.path, rows.first + first, count, rows.buffer, 0)
        target = shared[first * nbytes : (first + count) * nbytes]
        raw = target if memory is None else memory(target.size)
        source.read_blocks(rows.path, part.first * nbytes, raw)
        _refuse(source, part, _nonfinite_in_blocks(kind, raw))
        if memory is not None:
            np.copyto(target, raw)
    shared[rows.count * nbytes : _room(source, rows)] = 0


def words_of(source: BlockSource, rows: Rows) -> np.ndarray:
    """The bytes of rows as they lie on the device, arranged by the host: uint8.

    Raises:
      ModelFileError: as ``source.tensor``.
    """
    kind, nbytes = source.types[rows.path], _row_nbytes(source, rows.path)
    raw = aligned_empty((rows.count * nbytes,), np.uint8)
    source.read_blocks(rows.path, rows.first * nbytes, raw)
    packed = pack(raw, kind, (rows.count, _columns(source, rows.path)))
    _refuse(source, rows, find_nonfinite(packed))
    return device_words(packed)


def _refuse(source: BlockSource, rows: Rows, bad: Nonfinite | None) -> None:
    if bad is None or not source.checks:
        return
    kind, spec = source.types[rows.path], source.specs[rows.path]
    before = rows.first * _row_nbytes(source, rows.path) // FORMATS[kind].block.nbytes
    raise nonfinite_error(spec.gguf_name, kind, spec.shape, Nonfinite(bad.array, before + bad.block))


def _nonfinite_in_blocks(kind: GGMLType, raw: np.ndarray) -> Nonfinite | None:
    """``find_nonfinite`` of blocks that are not unpacked."""
    form = FORMATS[kind]
    blocks = raw.reshape(-1, form.block.nbytes)
    arrays = {name: form.block.field(blocks, name) for name in form.arrays if name in SCALE_NAMES}
    return find_nonfinite_blocks(kind, arrays, 0, None)
