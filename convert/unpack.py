"""From the bytes of a file to packed arrays, and from packed arrays to floating point.

``pack`` re-arranges blocks of ggml's types into the arrays of a
:class:`~qwen3_moe_jax.convert.packed.PackedTensor`; nothing is rounded. ``dequantize`` gives
back, in float32, bit for bit what ggml's own dequantizer gives for the same
bytes: the operations and their order are those of the C source that each
function names.

Both work in pieces small enough for the processor's caches, and
:func:`unpack_blocks` fills any range of blocks, so a loader can read a file in
chunks and a tensor never exists twice.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, ROWS, PackedTensor, array_shapes

ALIGNMENT = 64
"""Byte alignment of packed arrays: JAX's CPU backend can use such memory without a copy."""

PACK_CHUNK_BYTES = 4 << 20
PACK_THREADS = 4
_DEQUANTIZE_WEIGHTS = 1 << 18
"""Weights dequantized at a time: 1 MiB of float32, so that the second pass finds them in cache."""

Arrays = Mapping[str, np.ndarray]
"""Arrays of a packed tensor, flattened to ``[blocks, elements of one block]``."""


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
    step = max(1, PACK_CHUNK_BYTES // block.nbytes)

    def fill(start: int) -> None:
        stop = min(start + step, blocks)
        unpack_blocks(raw[start * block.nbytes : stop * block.nbytes], type, arrays, start)

    starts = range(0, blocks, step)
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
    _UNPACK[type](blocks, part)


def _field(blocks: np.ndarray, type: GGMLType, name: str) -> np.ndarray:
    """One field of every block, ``[blocks, count]``: a strided view of the file's bytes."""
    field = BLOCK_FORMATS[type].fields[name]
    return blocks[:, field.offset : field.offset + field.nbytes].view(field.dtype)


def _copy_fields(blocks: np.ndarray, type: GGMLType, out: Arrays, names: tuple[str, ...]) -> None:
    for name in names:
        out[name][...] = _field(blocks, type, name)


def _unpack_f32(blocks: np.ndarray, out: Arrays) -> None:
    """Plain little-endian float32."""
    _copy_fields(blocks, GGMLType.F32, out, ("w",))


def _unpack_f16(blocks: np.ndarray, out: Arrays) -> None:
    """Plain little-endian float16 (IEEE binary16)."""
    _copy_fields(blocks, GGMLType.F16, out, ("w",))


def _unpack_bf16(blocks: np.ndarray, out: Arrays) -> None:
    """bfloat16 bits, kept as uint16."""
    _copy_fields(blocks, GGMLType.BF16, out, ("w",))


def _unpack_q8_0(blocks: np.ndarray, out: Arrays) -> None:
    """``block_q8_0``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h"""
    _copy_fields(blocks, GGMLType.Q8_0, out, ("d", "q"))


def _unpack_q4_k(blocks: np.ndarray, out: Arrays) -> None:
    """``block_q4_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h"""
    _copy_fields(blocks, GGMLType.Q4_K, out, ("d", "dmin", "q"))
    _spread_scales(_field(blocks, GGMLType.Q4_K, "scales"), out["scales"], out["mins"])


def _unpack_q5_k(blocks: np.ndarray, out: Arrays) -> None:
    """``block_q5_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h"""
    _copy_fields(blocks, GGMLType.Q5_K, out, ("d", "dmin", "q", "qh"))
    _spread_scales(_field(blocks, GGMLType.Q5_K, "scales"), out["scales"], out["mins"])


def _unpack_q6_k(blocks: np.ndarray, out: Arrays) -> None:
    """``block_q6_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h"""
    _copy_fields(blocks, GGMLType.Q6_K, out, ("d", "scales", "qh", "ql"))


def _spread_scales(packed: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> None:
    """Spreads the 12 bytes of 6-bit scales and mins of Q4_K and Q5_K to one byte each.

    ``get_scale_min_k4`` in
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c:
    bytes 0-3 and 4-7 hold scales 0-3 and mins 0-3 in their low six bits and the
    top two bits of scales and mins 4-7 above them; bytes 8-11 hold the low four
    bits of both. Four bytes at a time, as the lanes of one 32-bit word.

    Args:
      packed: uint8 [blocks, 12].
      scales: uint8 [blocks, 8], written.
      mins: uint8 [blocks, 8], written.
    """
    low_scales, low_mins, high = np.ascontiguousarray(packed).view("<u4").T
    scale_words, min_words = scales.view("<u4"), mins.view("<u4")
    scale_words[:, 0] = low_scales & 0x3F3F3F3F
    scale_words[:, 1] = (high & 0x0F0F0F0F) | ((low_scales >> 2) & 0x30303030)
    min_words[:, 0] = low_mins & 0x3F3F3F3F
    min_words[:, 1] = ((high >> 4) & 0x0F0F0F0F) | ((low_mins >> 2) & 0x30303030)


_UNPACK: dict[GGMLType, Callable[[np.ndarray, Arrays], None]] = {
    GGMLType.F32: _unpack_f32,
    GGMLType.F16: _unpack_f16,
    GGMLType.BF16: _unpack_bf16,
    GGMLType.Q8_0: _unpack_q8_0,
    GGMLType.Q4_K: _unpack_q4_k,
    GGMLType.Q5_K: _unpack_q5_k,
    GGMLType.Q6_K: _unpack_q6_k,
}


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
    step = _DEQUANTIZE_WEIGHTS // weights
    # Damaged scales give NaN or infinity quietly here; find_nonfinite is where they are refused.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            part = {name: array[start : start + step] for name, array in arrays.items()}
            _DEQUANTIZE[packed.type](part, blocks[start : start + step])
    return out


def _dequantize_float(arrays: Arrays, out: np.ndarray) -> None:
    """F32 and F16: a plain conversion."""
    out[...] = arrays["w"]


def _dequantize_bf16(arrays: Arrays, out: np.ndarray) -> None:
    """``ggml_compute_bf16_to_fp32``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-impl.h"""
    out[...] = (arrays["w"].astype(np.uint32) << 16).view(np.float32)


def _dequantize_q8_0(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q8_0``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = arrays["q"]
    out *= arrays["d"].astype(out.dtype)


def _dequantize_q4_k(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q4_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    q = arrays["q"].reshape(-1, 4, 32)
    halves = out.reshape(-1, 4, 2, 32)
    halves[:, :, 0] = q & 0x0F
    halves[:, :, 1] = q >> 4
    _apply_scales_and_mins(arrays, out)


def _dequantize_q5_k(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q5_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    q = arrays["q"].reshape(-1, 4, 32)
    halves = out.reshape(-1, 4, 2, 32)
    # Bit j of high byte l is the fifth bit of weight l of subblock j.
    for pair in range(4):
        halves[:, pair, 0] = (q[:, pair] & 0x0F) | ((arrays["qh"] >> (2 * pair) & 1) << 4)
        halves[:, pair, 1] = (q[:, pair] >> 4) | ((arrays["qh"] >> (2 * pair + 1) & 1) << 4)
    _apply_scales_and_mins(arrays, out)


def _apply_scales_and_mins(arrays: Arrays, out: np.ndarray) -> None:
    """``(d * scale) * q - (dmin * min)`` in place, each product rounded as ggml does."""
    subblocks = out.reshape(-1, 8, 32)
    subblocks *= (arrays["d"].astype(out.dtype) * arrays["scales"])[:, :, None]
    subblocks -= (arrays["dmin"].astype(out.dtype) * arrays["mins"])[:, :, None]


def _dequantize_q6_k(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q6_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c

    Each half of a superblock holds four groups of 32 weights. Byte l of ``ql``
    has the low bits of groups 0 and 2, byte l + 32 those of groups 1 and 3;
    byte l of ``qh`` has two high bits for each of the four groups.
    """
    ql = arrays["ql"].reshape(-1, 2, 2, 32)
    qh = arrays["qh"].reshape(-1, 2, 32)
    groups = out.reshape(-1, 2, 4, 32)
    for group in range(4):
        low = ql[:, :, group % 2] >> 4 if group >= 2 else ql[:, :, group % 2] & 0x0F
        high = (qh >> (2 * group)) & 0x03
        groups[:, :, group] = (low | (high << 4)).view(np.int8) - np.int8(32)
    subblocks = out.reshape(-1, SUPERBLOCK // 16, 16)
    subblocks *= (arrays["d"].astype(out.dtype) * arrays["scales"])[:, :, None]


_DEQUANTIZE: dict[GGMLType, Callable[[Arrays, np.ndarray], None]] = {
    GGMLType.F32: _dequantize_float,
    GGMLType.F16: _dequantize_float,
    GGMLType.BF16: _dequantize_bf16,
    GGMLType.Q8_0: _dequantize_q8_0,
    GGMLType.Q4_K: _dequantize_q4_k,
    GGMLType.Q5_K: _dequantize_q5_k,
    GGMLType.Q6_K: _dequantize_q6_k,
}


# Numbers that are no numbers


@dataclass(frozen=True)
class Nonfinite:
    """Where a tensor holds a NaN or an infinity.

    Attributes:
      array: name of the packed array: ``d`` and ``dmin`` are scales, ``w`` weights.
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


def find_nonfinite(packed: PackedTensor) -> Nonfinite | None:
    """The first NaN or infinite scale (or weight, in types without scales), or None."""
    return find_nonfinite_blocks(packed.type, block_arrays(packed), 0, None)


def find_nonfinite_blocks(type: GGMLType, arrays: Arrays, start: int, stop: int | None) -> Nonfinite | None:
    """:func:`find_nonfinite` for the blocks ``[start, stop)`` of :func:`block_arrays`."""
    found = []
    for name, array in ARRAY_FORMATS[type].items():
        if name not in ("w", "d", "dmin"):
            continue
        mask = _EXPONENT_MASKS[array.dtype]
        part = np.ascontiguousarray(arrays[name][start:stop]).reshape(-1)
        if part.size and _any_nonfinite(part, mask):
            exponents = part.view(f"u{part.dtype.itemsize}") & mask
            found.append(Nonfinite(name, start + int(np.argmax(exponents == mask))))
    return min(found, key=lambda bad: bad.block, default=None)
