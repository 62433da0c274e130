"""From the bytes of a file to packed arrays, and from packed arrays to floating point.

``pack`` re-arranges blocks of ggml's types into the arrays of a
:class:`~qwen3_moe_jax.convert.packed.PackedTensor`; nothing is rounded. ``dequantize`` gives
back, in float32, bit for bit what ggml's own dequantizer gives for the same
bytes: the operations and their order are those of the C source that each
function names.

Both work in pieces small enough for the processor's caches, and
:func:`unpack_blocks` fills any range of blocks, so a loader can read a file in
pieces and a tensor never exists twice.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS, SCALE_NAMES
from qwen3_moe_jax.convert.formats.base import Arrays
from qwen3_moe_jax.convert.formats.mxfp4 import MAX_EXPONENT
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, ROWS, PackedTensor, array_shapes

ALIGNMENT = 64
"""Byte alignment of packed arrays: JAX's CPU backend can use such memory without a copy."""

PACK_PIECE_BYTES = 4 << 20
PACK_THREADS = 4
_DEQUANTIZE_WEIGHTS = 1 << 18
"""Weights dequantized at a time: 1 MiB of float32, so that the second pass finds them in cache."""


# Allocation


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Like ``np.empty``, at an address that is a multiple of ``ALIGNMENT``."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def empty_packed(type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """A packed tensor of ``type`` and logical ``shape`` with aligned, uninitialized arrays.

    Raises:
      ValueError: the last axis is not a whole number of blocks.
    """
    block = BLOCK_FORMATS[type]
    if not shape or shape[-1] % block.weights:
        raise ValueError(
            f"shape {shape} of a {type.name} tensor: rows must be a multiple of {block.weights} weights"
        )
    formats = ARRAY_FORMATS[type]
    arrays = {n: aligned_empty(s, formats[n].dtype) for n, s in array_shapes(type, shape).items()}
    return PackedTensor(arrays, type)


def block_arrays(packed: PackedTensor) -> dict[str, np.ndarray]:
    """The arrays as ``[blocks, elements of one block]``: views where the arrays are contiguous.

    Raises:
      ValueError: a layout other than ``"rows"``, whose blocks do not lie one after the other.
    """
    if packed.layout != ROWS:
        raise ValueError(f"{packed!r}: only layout {ROWS!r} can be taken apart; convert it first")
    weights = BLOCK_FORMATS[packed.type].weights
    return {
        name: np.asarray(packed.arrays[name]).reshape(-1, weights // array.weights)
        for name, array in ARRAY_FORMATS[packed.type].items()
    }


# File bytes to packed arrays


def pack(raw: np.ndarray, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Packs the bytes of a whole tensor.

    Args:
      raw: uint8 [nbytes], the tensor's bytes as they are in the file.
      type: its type.
      shape: its logical shape in C order, ``[..., N, K]`` or ``[K]``.

    Returns:
      A packed tensor in layout ``"rows"`` with 64-byte aligned arrays.

    Raises:
      ValueError: ``raw`` is not the number of bytes that type and shape say.
    """
    packed = empty_packed(type, shape)
    block = BLOCK_FORMATS[type]
    blocks = math.prod(shape) // block.weights
    if raw.dtype != np.uint8 or raw.size != blocks * block.nbytes:
        raise ValueError(
            f"{type.name} {shape} takes {blocks * block.nbytes} bytes, got {raw.size} of {raw.dtype}"
        )
    raw = raw.reshape(-1)
    arrays = block_arrays(packed)
    stride = max(1, PACK_PIECE_BYTES // block.nbytes)

    def fill(start: int) -> None:
        stop = min(start + stride, blocks)
        unpack_blocks(raw[start * block.nbytes : stop * block.nbytes], type, arrays, start)

    starts = range(0, blocks, stride)
    if len(starts) < 2:
        for start in starts:
            fill(start)
        return packed
    with ThreadPoolExecutor(PACK_THREADS) as pool:
        list(pool.map(fill, starts))
    return packed


def unpack_blocks(raw: np.ndarray, type: GGMLType, arrays: Arrays, start: int) -> None:
    """Re-arranges a run of whole blocks into ``arrays``, beginning at block ``start``.

    Args:
      raw: uint8 [blocks * bytes of one block], contiguous.
      type: the type of the blocks.
      arrays: :func:`block_arrays` of the destination.
      start: index of the first block in the whole tensor.
    """
    blocks = raw.reshape(-1, BLOCK_FORMATS[type].nbytes)
    part = {name: array[start : start + len(blocks)] for name, array in arrays.items()}
    FORMATS[type].fill(blocks, part)


# Packed arrays to floating point


def dequantize(packed: PackedTensor, dtype: Any = np.float32) -> np.ndarray:
    """The weights as floating-point numbers.

    Slices work as whole tensors do: ``dequantize(experts[7])`` is one expert,
    ``dequantize(embed_tokens[token_ids])`` a lookup of rows.

    Args:
      packed: any packed tensor, of NumPy arrays or anything ``np.asarray`` takes.
      dtype: float32 (bit for bit what ggml computes) or float64 (the same formula
        in float64, which is exact for every type).

    Returns:
      ``dtype`` [*packed.shape].

    Raises:
      ValueError: another dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"dequantize makes float32 or float64, not {dtype}")
    arrays = block_arrays(packed)
    weights = BLOCK_FORMATS[packed.type].weights
    out = np.empty(packed.shape, dtype)
    blocks = out.reshape(-1, weights)
    stride = _DEQUANTIZE_WEIGHTS // weights
    # Damaged scales give NaN or infinity quietly here; find_nonfinite is where they are refused.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), stride):
            part = {name: array[start : start + stride] for name, array in arrays.items()}
            FORMATS[packed.type].dequantize(part, blocks[start : start + stride])
    return out


# Numbers that are no numbers


@dataclass(frozen=True)
class Nonfinite:
    """Where a tensor holds a NaN or an infinity.

    Attributes:
      array: name of the packed array: ``w`` holds weights, others scales.
      block: index of the block in the whole tensor, in the order of the file.
    """

    array: str
    block: int

    def describe(self, type: GGMLType, shape: tuple[int, ...]) -> str:
        """In words: what, and in which expert, row and superblock."""
        *leading, row_length = shape
        weights = BLOCK_FORMATS[type].weights
        *above, column_block = np.unravel_index(self.block, (*leading, row_length // weights))
        where = [f"{word} {i}" for word, i in zip(("expert", "row")[2 - len(above) :], above, strict=True)]
        if weights == SUPERBLOCK:
            where.append(f"superblock {column_block}")
        first = column_block * weights
        where.append(f"columns {first}-{first + weights - 1}" if weights > 1 else f"column {first}")
        what = "a weight" if self.array == "w" else f"the scale {self.array}"
        return f"{what} is NaN or infinite in {', '.join(where)}"


_EXPONENT_MASKS = {"float16": 0x7C00, "uint16": 0x7F80, "float32": 0x7F800000}
"""A number is NaN or infinite when all bits of its exponent are set; uint16 holds bfloat16."""


def _any_nonfinite(values: np.ndarray, mask: int) -> bool:
    """Whether an exponent is all ones, in two passes without a temporary array.

    As signed integers, positive infinity and NaNs are the largest of all
    numbers; as unsigned ones, negative infinity and NaNs are.
    """
    width = values.dtype.itemsize
    sign = 1 << (8 * width - 1)
    return bool(values.view(f"i{width}").max() >= mask or values.view(f"u{width}").max() >= (mask | sign))


def _first_nonfinite(values: np.ndarray, dtype: str) -> int | None:
    """Index of the first NaN or infinity; of exponents of MXFP4, of one whose weights may be infinite."""
    if dtype == "uint8":
        return int(np.argmax(values > MAX_EXPONENT)) if values.max() > MAX_EXPONENT else None
    mask = _EXPONENT_MASKS[dtype]
    if not _any_nonfinite(values, mask):
        return None
    return int(np.argmax(values.view(f"u{values.dtype.itemsize}") & mask == mask))


def find_nonfinite(packed: PackedTensor) -> Nonfinite | None:
    """The first NaN or infinite scale (or weight, in types without scales), or None."""
    return find_nonfinite_blocks(packed.type, block_arrays(packed), 0, None)


def find_nonfinite_blocks(type: GGMLType, arrays: Arrays, start: int, stop: int | None) -> Nonfinite | None:
    """:func:`find_nonfinite` for the blocks ``[start, stop)`` of :func:`block_arrays`."""
    found: list[Nonfinite] = []
    for name, array in ARRAY_FORMATS[type].items():
        if name not in SCALE_NAMES:
            continue
        part = np.ascontiguousarray(arrays[name][start:stop]).reshape(-1)
        first = _first_nonfinite(part, array.dtype) if part.size else None
        if first is not None:
            found.append(Nonfinite(name, start + first))
    return min(found, key=lambda bad: bad.block, default=None)
