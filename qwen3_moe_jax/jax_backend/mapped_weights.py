"""Parameters of a CPU in a file that is mapped, which JAX reads in place (``machine.kept_weights``)."""

import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.manifest import piece_digest, pieces
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.machine import kept_weights
from qwen3_moe_jax.machine.kept_weights import ARRAYS, Manifest, Row
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.threads import cores

ALIGNMENT = 4096
"""Of an array in the file: a page, and enough for JAX to use it without a copy."""

Fill = Callable[[Any], object]
"""Writes every tensor to its place in parameters that are given."""


class FileArray:
    """An array in a file, of which rows can be written and nothing can be read: memory is not taken.

    Attributes:
      shape: of the array.
    """

    def __init__(self, descriptor: int, offset: int, shape: tuple[int, ...], dtype: np.dtype):
        self._descriptor, self._offset, self.shape, self._dtype = descriptor, offset, shape, dtype
        self._row_nbytes = math.prod(shape[1:]) * dtype.itemsize

    def __getitem__(self, row: int) -> "FileArray":
        return FileArray(self._descriptor, self._offset + row * self._row_nbytes, self.shape[1:], self._dtype)

    def __setitem__(self, rows: slice, value: np.ndarray) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        if value.shape != (stop - start, *self.shape[1:]) or value.dtype != self._dtype:
            raise ValueError(f"{value.dtype} {value.shape} is not rows {start} to {stop} of {self.shape}")
        data = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        at = self._offset + start * self._row_nbytes
        while data:
            written = os.pwrite(self._descriptor, data, at)
            data, at = data[written:], at + written


def rows_of(shapes: Any) -> tuple[tuple[Row, ...], int]:
    """Where each leaf of some parameters lies in the file, in their order; bytes of the file."""
    rows: list[Row] = []
    end = 0
    for leaf in jax.tree.leaves(shapes):
        dtype = np.dtype(leaf.dtype)
        rows.append((dtype.str, tuple(leaf.shape), end))
        end += -(-math.prod(leaf.shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return tuple(rows), end


def load_mapped(
    source: ModelSource, plan: MemoryPlan, shapes: Any, fill: Fill, progress: ProgressCallback | None = None
) -> Any:
    """Parameters as read-only NumPy arrays of a file that is mapped; the file is written if need be.

    Args:
      source: the model.
      plan: of the load, for messages.
      shapes: of the parameters.
      fill: called if there is no sound file.
      progress: told how far the comparison of a file with its digests is.

    Raises:
      MemoryPlanError: the disk cannot have the file.
      ModelFileError: as ``fill``.
    """
    rows, nbytes = rows_of(shapes)
    folder = kept_weights.folder_of(source)
    kept = folder and Manifest.read(folder)
    if folder and kept and (kept.arrays, kept.nbytes) == (rows, nbytes) and kept.identity == source.identity:
        mapped = _map(folder / ARRAYS, nbytes)
        if _digests(mapped, progress) == kept.sha256:
            return _views(shapes, rows, mapped)
        kept_weights.log.warning(f"{folder} is damaged: it is written again")
    with kept_weights.new_folder(source, plan, nbytes) as temporary:
        mapped = _written(temporary / ARRAYS, shapes, rows, nbytes, fill)
        digests = _digests(mapped)
        Manifest(str(source.path.absolute()), source.identity, nbytes, rows, digests).write(temporary)
    return _views(shapes, rows, mapped)


def describe_mapped(source: ModelSource, plan: MemoryPlan) -> str | None:
    """For people: the file that weights are mapped from; None where memory holds them."""
    if not plan.is_mapped:
        return None
    return (
        f"mapped from {kept_weights.folder_of(source)}: of {plan.weights / 1e9:.2f} GB, {plan.share:.0%} fit "
        "memory, and the rest is read from the disk when it is used"
    )


def _written(path: Path, shapes: Any, rows: tuple[Row, ...], nbytes: int, fill: Fill) -> mmap.mmap:
    """Makes the file, lets ``fill`` write it, and maps it."""
    with open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), nbytes)
        places = [FileArray(file.fileno(), at, shape, np.dtype(kind)) for kind, shape, at in rows]
        fill(jax.tree.unflatten(jax.tree.structure(shapes), places))
        os.fchmod(file.fileno(), 0o400)
    return _map(path, nbytes)


def _map(path: Path, nbytes: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)


def _views(shapes: Any, rows: tuple[Row, ...], mapped: mmap.mmap) -> Any:
    """The arrays of a file; it stays mapped while one of them is there."""
    views = [
        np.frombuffer(mapped, np.dtype(kind), math.prod(shape), at).reshape(shape) for kind, shape, at in rows
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), views)


def _digests(mapped: mmap.mmap, progress: ProgressCallback | None = None) -> tuple[str, ...]:
    """SHA-256 of the file's pieces; all of it is read, and is in memory then as far as it fits."""
    whole, found = memoryview(mapped), list[str]()
    with ThreadPoolExecutor(cores(), thread_name_prefix="hash") as pool:

        def digest(piece: slice) -> str:
            mapped.madvise(mmap.MADV_WILLNEED, piece.start, piece.stop - piece.start)
            return piece_digest(whole[piece])

        try:
            for piece, text in zip(parts := pieces(len(whole)), pool.map(digest, parts), strict=True):
                found.append(text)
                if progress:
                    progress(piece.stop, len(whole))
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(found)
