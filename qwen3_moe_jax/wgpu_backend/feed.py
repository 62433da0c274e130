"""Weights from a file to buffers: read, checked and arranged in threads, written by one.

Many types lie on the device as ggml's own blocks do (``layout``), and of most others a GPU changes the order
itself (``reorder``): a piece of a GGUF file is read straight into what is written, and only its scales are
looked at. Other types, and other sources, are arranged from packed arrays. The next pieces are read while one
is written, with the interpreter's lock free.
"""

from collections import deque
from collections.abc import Iterator, Sequence
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
from qwen3_moe_jax.wgpu_backend.reorder import Reorder, can_reorder

AHEAD = 2
"""Pieces that are ready and not yet written, beside those that are being read."""

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
    """Writes them in their order; yields bytes of the file that have been read.

    Args:
      device: whose buffers are written.
      source: an open file.
      wanted: what goes where.
      reorder: changes the order of bytes on the device; None leaves that to threads of the host.

    Raises:
      ModelFileError: as ``source.tensor``.
    """

    def is_raw(rows: Rows) -> bool:
        kind = source.types[rows.path]
        return reorder is not None and kind not in AS_IN_THE_FILE and can_reorder(kind)

    def read(rows: Rows) -> np.ndarray:
        return raw_blocks(source, rows) if is_raw(rows) else words_of(source, rows)

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="load") as pool:
        waiting: deque[tuple[Rows, Future[np.ndarray]]] = deque()
        left = (piece for rows in wanted for piece in pieces(source, rows))
        try:
            while True:
                while len(waiting) < READ_THREADS + AHEAD and (piece := next(left, None)) is not None:
                    waiting.append((piece, pool.submit(read, piece)))
                if not waiting:
                    return
                piece, future = waiting.popleft()
                if reorder is not None and is_raw(piece):
                    reorder.write(source.types[piece.path], future.result(), piece.buffer, piece.offset)
                else:
                    device.write(piece.buffer, future.result(), piece.offset)
                    device.flush()
                yield piece.count * _row_nbytes(source, piece.path)
        finally:
            for _, future in waiting:
                future.cancel()


def _columns(source: BlockSource, path: str) -> int:
    return source.specs[path].shape[-1]


def _row_nbytes(source: BlockSource, path: str) -> int:
    return FORMATS[source.types[path]].block.row_nbytes(_columns(source, path))


def pieces(source: BlockSource, rows: Rows) -> Iterator[Rows]:
    """Rows in pieces of about UPLOAD_PIECE bytes that begin on a vector."""
    kind, columns = source.types[rows.path], _columns(source, rows.path)
    stride = granule(kind, columns)
    stride *= max(1, UPLOAD_PIECE // device_nbytes(kind, stride * columns))
    for first in range(0, rows.count, stride):
        count = min(stride, rows.count - first)
        offset = rows.offset + device_nbytes(kind, first * columns)
        yield Rows(rows.path, rows.first + first, count, rows.buffer, offset)


def words_of(source: BlockSource, rows: Rows) -> np.ndarray:
    """The bytes of rows as they lie on the device: uint8.

    Raises:
      ModelFileError: as ``source.tensor``.
    """
    kind, columns = source.types[rows.path], _columns(source, rows.path)
    if kind in AS_IN_THE_FILE:
        return raw_blocks(source, rows)
    size = rows.count * _row_nbytes(source, rows.path)
    packed = pack(_read(source, rows, size), kind, (rows.count, columns))
    _refuse(source, rows, find_nonfinite(packed))
    return device_words(packed)


def raw_blocks(source: BlockSource, rows: Rows) -> np.ndarray:
    """The bytes of rows as the file has them: uint8, with zeros up to the size that they have on the device.

    Raises:
      ModelFileError: as ``source.tensor``.
    """
    kind, size = source.types[rows.path], rows.count * _row_nbytes(source, rows.path)
    raw = _read(source, rows, device_nbytes(kind, rows.count * _columns(source, rows.path)))
    _refuse(source, rows, _nonfinite_in_blocks(kind, raw[:size]))
    return raw


def _read(source: BlockSource, rows: Rows, room: int) -> np.ndarray:
    """The rows' bytes and zeros, ``room`` in all."""
    nbytes = _row_nbytes(source, rows.path)
    size = rows.count * nbytes
    raw = aligned_empty((room,), np.uint8)
    raw[size:] = 0
    source.read_blocks(rows.path, rows.first * nbytes, raw[:size])
    return raw


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
