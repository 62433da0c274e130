"""Weights to main memory in pieces: read, unpacked, arranged and put where they belong, side by side.

Arrays are allocated first, in the layout that a CPU reads best. A piece is so small that a thread does all of
it inside of the processor's caches, and that nothing of a tensor exists twice beside the arrays:

==========  ====================================================
bound       bytes
==========  ====================================================
a .gguf     READ_THREADS pieces: raw, unpacked, and arranged
checkpoint  one tensor, unpacked and arranged
==========  ====================================================
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.layouts.lanes16 import to_layout
from qwen3_moe_jax.convert.packed import LANES, Box, PackedTensor
from qwen3_moe_jax.convert.source import READ_PIECE_BYTES, READ_THREADS, BlockSource, ModelSource
from qwen3_moe_jax.convert.unpack import aligned_empty
from qwen3_moe_jax.jax_backend.device_load import as_rows
from qwen3_moe_jax.kernels_pallas.packed.stacks import rows_per_unit

Value = PackedTensor | np.ndarray | jax.Array


def allocate(shapes: Any) -> Any:
    """Arrays of these shapes whose content is not set; memory that nothing is written to is not taken."""
    return jax.tree.map(lambda a: aligned_empty(a.shape, np.dtype(a.dtype)), shapes)


def boxes(
    shape: tuple[int, ...], row_nbytes: int, maximum: int = READ_PIECE_BYTES
) -> Iterator[tuple[int, Box]]:
    """Cuts a matrix [N, K], or one for each expert [E, N, K], into pieces: (first row, box).

    Args:
      shape: of the tensor.
      row_nbytes: of a row in the source.
      maximum: bytes of a piece, if that holds LANES rows: whole experts where it holds one, else such groups.
    """
    *experts, rows, columns = shape
    together = maximum // (rows * row_nbytes)
    if experts and together:
        for e in range(0, experts[0], together):
            yield e * rows, ((e, min(e + together, experts[0])), (0, rows), (0, columns))
        return
    step = LANES * max(1, maximum // (LANES * row_nbytes))
    for e in range(*experts or (1,)):
        expert = ((e, e + 1),) if experts else ()
        for row in range(0, rows, step):
            yield e * rows + row, (*expert, (row, min(row + step, rows)), (0, columns))


class HostLoader:
    """Puts the tensors of a source into arrays of the host; a context that ends its threads."""

    def __init__(self, source: ModelSource):
        self._source = source
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="load")

    def __enter__(self) -> "HostLoader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, path: str, target: PackedTensor, first: int = 0) -> None:
        """Reads a matrix, or those of all experts, into ``target`` from row ``first`` on.

        Raises:
          ModelFileError: as ``source.tensor``.
        """
        source = self._source
        put = lambda row, value: fill(target, first + row, arranged_as(target, flat(value)))
        if not isinstance(source, BlockSource):
            put(0, source.tensor(path))
            return

        def one(piece: tuple[int, Box]) -> None:
            row, box = piece
            put(row, source.part(path, box))

        shape, kind = source.specs[path].shape, BLOCK_FORMATS[source.types[path]]
        for _ in self._pool.map(one, boxes(shape, kind.row_nbytes(shape[-1]))):
            pass


def arranged_as(shape: Value, value: Value) -> Value:
    """A tensor of the host in the layout of ``shape``, which is one of ``params.device_params``."""
    if isinstance(shape, PackedTensor) and isinstance(value, PackedTensor):
        return to_layout(value, shape.layout)
    return value


def flat(value: Value) -> Value:
    """The experts' matrices as rows one after the other; a vector as one row."""
    return as_rows(value) if isinstance(value, PackedTensor) else value[None]


def fill(stack: Value, first: int, value: Value) -> None:
    """Writes a tensor's rows, arranged as the stack is, into a stack of the host from row ``first`` on."""
    begin = first // unit_of(value)

    def put(target: np.ndarray, new: np.ndarray) -> None:
        target[begin : begin + len(new)] = new

    jax.tree.map(put, stack, value)


def unit_of(value: Value) -> int:
    """Rows that lie side by side."""
    return rows_per_unit(value.layout) if isinstance(value, PackedTensor) else 1
