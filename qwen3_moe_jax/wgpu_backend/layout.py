"""The words in which packed weights lie on the device.

Kernels read 16 bytes at a time, so every type becomes whole vectors of four
32-bit words, with no padding but at a tensor's end (Q3_K, IQ1_M and IQ4_XS take 3.6 %,
3.6 % and 1.5 % more than in a file, as packed):

======  =====================================================================
type    words
======  =====================================================================
Q4_K    9 vectors per superblock, ggml's own bytes: d, dmin and the 12 bytes of
        six-bit scales and mins; 128 bytes of nibbles
Q5_K    11 vectors, ggml's own bytes: the same with 32 bytes of high bits
        before the nibbles
Q6_K    105 vectors for eight superblocks: their eight d, then for each 128
        bytes of ql, 64 of qh and 16 scales
Q8_0    17 vectors for eight blocks: their eight d, then 32 int8 each
Q2_K,   for eight superblocks or blocks, one array after the other as it is packed:
Q3_K,   42, 57 and 69 vectors of d (and dmin), scales (one byte each; with minimums in
IQ4_XS  Q2_K), qh of Q3_K, q
Q4_0,   the same for eight blocks of 32: 9, 10, 11, 12 and 9 vectors of d, m, qh and
Q4_1,   q, where the type has them
Q5_0,
Q5_1,
IQ4_NL
MXFP4   17 vectors for 16 blocks: their exponents, then 16 bytes of nibbles each
IQ1,    for eight superblocks, one array after the other, as packed: d, scales, qh, signs, q
IQ2,    and q16, where the type has them; the points of the grids are in a table of their own
IQ3,
TQ1_0,
TQ2_0
F16,    one vector for eight weights
BF16
F32     one vector for four weights
======  =====================================================================

``shaders/formats.wgsl`` reads them.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.formats.grids import GRIDS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import pack


@dataclass(frozen=True)
class WordFormat:
    """How a type's weights lie.

    Attributes:
      kind: the type's number in shaders.
      block: weights that lie together and cannot be split.
      unit: weights that an invocation decodes at a time.
      group: blocks that share vectors.
      group_vectors: 16-byte vectors of one group.
    """

    kind: int
    block: int
    unit: int
    group: int
    group_vectors: int

    def vectors(self, num_blocks: int) -> int:
        """Vectors of this many blocks in a row."""
        return -(-num_blocks // self.group) * self.group_vectors


WORD_FORMATS: dict[GGMLType, WordFormat] = {
    GGMLType.F32: WordFormat(0, 4, 4, 1, 1),
    GGMLType.F16: WordFormat(1, 8, 8, 1, 1),
    GGMLType.BF16: WordFormat(2, 8, 8, 1, 1),
    GGMLType.Q8_0: WordFormat(3, 32, 16, 8, 17),
    GGMLType.Q4_K: WordFormat(4, 256, 64, 1, 9),
    GGMLType.Q5_K: WordFormat(5, 256, 64, 1, 11),
    GGMLType.Q6_K: WordFormat(6, 256, 64, 8, 105),
    GGMLType.Q4_0: WordFormat(7, 32, 32, 8, 9),
    GGMLType.Q4_1: WordFormat(8, 32, 32, 8, 10),
    GGMLType.Q5_0: WordFormat(9, 32, 32, 8, 11),
    GGMLType.Q5_1: WordFormat(10, 32, 32, 8, 12),
    GGMLType.IQ4_NL: WordFormat(11, 32, 32, 8, 9),
    GGMLType.Q2_K: WordFormat(12, 256, 64, 8, 42),
    GGMLType.Q3_K: WordFormat(13, 256, 64, 8, 57),
    GGMLType.IQ4_XS: WordFormat(14, 256, 32, 8, 69),
    GGMLType.MXFP4: WordFormat(15, 32, 32, 16, 17),
    GGMLType.IQ3_S: WordFormat(16, 256, 32, 8, 55),
    GGMLType.IQ3_XXS: WordFormat(17, 256, 32, 8, 49),
    GGMLType.IQ2_S: WordFormat(18, 256, 32, 8, 41),
    GGMLType.IQ2_XS: WordFormat(19, 256, 32, 8, 37),
    GGMLType.IQ2_XXS: WordFormat(20, 256, 32, 8, 33),
    GGMLType.IQ1_S: WordFormat(21, 256, 32, 8, 25),
    GGMLType.IQ1_M: WordFormat(22, 256, 32, 8, 29),
    GGMLType.TQ1_0: WordFormat(23, 256, 32, 8, 27),
    GGMLType.TQ2_0: WordFormat(24, 256, 32, 8, 33),
}

_IN_TURN = ("d", "m", "dmin", "e", "scales", "qh", "signs", "q", "q16")
"""The arrays of types that lie array by array, in their order."""

_GRID_TYPES = {"IQ1_S": "IQ1", "IQ1_M": "IQ1"}
"""The grid of types that do not have one of their own name."""

GRID_OFFSETS: dict[str, int] = dict(
    zip(GRIDS, accumulate((grid.size // 4 for grid in GRIDS.values()), initial=0), strict=False)
)
"""The first word of each grid in :func:`grid_words`."""


def grid_words() -> np.ndarray:
    """The points of all grids as shaders read them: int8, four weights in a word."""
    return np.concatenate([grid.reshape(-1) for grid in GRIDS.values()])


def reads_grids(type_name: str) -> bool:
    """Whether a type's weights are points of a grid."""
    return _GRID_TYPES.get(type_name, type_name) in GRIDS


def device_nbytes(type: GGMLType, num_weights: int) -> int:
    """Bytes that so many weights of whole rows take on the device."""
    layout = WORD_FORMATS[type]
    return 16 * layout.vectors(num_weights // layout.block)


def granule(type: GGMLType, weights_per_item: int) -> int:
    """Items (rows, or experts) after which a group of blocks ends, so that the next start on a vector."""
    layout = WORD_FORMATS[type]
    return layout.group // math.gcd(layout.group, weights_per_item // layout.block)


def items_per_window(
    type: GGMLType, items: int, weights_per_item: int, max_bytes: int, max_items: int, stride: int = 1
) -> int:
    """How many items of a tensor one buffer takes: all, or a multiple of the granule and of ``stride``.

    Raises:
      ValueError: not even the smallest number of items fits.
    """
    if device_nbytes(type, items * weights_per_item) <= max_bytes and items <= max_items:
        return items
    stride = max(stride, granule(type, weights_per_item))  # both are powers of two
    count = min(max_bytes // device_nbytes(type, stride * weights_per_item), max_items // stride) * stride
    if count == 0:
        raise ValueError(
            f"{stride} x {weights_per_item} weights of {type.name} exceed the {max_bytes} bytes "
            "that the adapter binds at once"
        )
    return count


def device_words(rows: PackedTensor) -> np.ndarray:
    """The bytes of packed rows as they lie on the device: uint8, contiguous.

    Args:
      rows: layout "rows"; leading axes are taken as one run of rows.
    """
    arrays = {name: np.asarray(a) for name, a in rows.arrays.items()}
    if rows.type in _WRITERS:
        return _WRITERS[rows.type](arrays)
    layout = WORD_FORMATS[rows.type]
    return _array_by_array(arrays, math.prod(rows.shape) // layout.block, layout)


@cache
def byte_order(type: GGMLType) -> np.ndarray | None:
    """Where a group's bytes on the device are in ggml's own blocks: int32, one number per byte.

    None where the bytes differ, as scales that are unpacked do, and where blocks are as small as a vector.
    """
    layout, form = WORD_FORMATS[type], FORMATS[type]
    count = layout.group * form.block.nbytes
    if 16 * layout.group_vectors != count:
        return None

    def arranged(raw: np.ndarray) -> np.ndarray:
        shape = (1, layout.group * layout.block)
        return device_words(pack(raw.astype(np.uint8), type, shape)).astype(np.int32)

    places = np.arange(count, dtype=np.int32)
    order = arranged(places & 255) | arranged(places >> 8) << 8
    is_order = bool((np.sort(order) == places).all())
    mixed = places * 167 + (places >> 8) & 255  # other bytes: only an order gives them too
    return order if is_order and bool((arranged(mixed) == mixed[order]).all()) else None


def _array_by_array(arrays: dict[str, np.ndarray], blocks: int, layout: WordFormat) -> np.ndarray:
    """For each group of blocks one array after the other; zeros after the last block."""
    out = np.zeros((-(-blocks // layout.group), 16 * layout.group_vectors), np.uint8)
    at = 0
    for name in (name for name in _IN_TURN if name in arrays):
        values = np.ascontiguousarray(arrays[name]).view(np.uint8).reshape(blocks, -1)
        padded = np.zeros((len(out) * layout.group, values.shape[1]), np.uint8)
        padded[:blocks] = values
        end = at + layout.group * values.shape[1]
        out[:, at:end] = padded.reshape(len(out), -1)
        at = end
    return out.reshape(-1)


def _plain(arrays: dict[str, np.ndarray]) -> np.ndarray:
    words = np.ascontiguousarray(arrays["w"]).reshape(-1).view(np.uint8)
    return np.pad(words, (0, -len(words) % 16))


def _six_bit_scales(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The 12 bytes that ``get_scale_min_k4`` reads (ggml-quants.c of llama.cpp at 0c1e57098)."""
    scales, mins = arrays["scales"].reshape(-1, 8), arrays["mins"].reshape(-1, 8)
    packed = np.empty((len(scales), 12), np.uint8)
    packed[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    packed[:, 4:8] = mins[:, :4] | (mins[:, 4:] >> 4 << 6)
    packed[:, 8:12] = (scales[:, 4:] & 15) | (mins[:, 4:] << 4)
    return packed


def _k_block(arrays: dict[str, np.ndarray], nbytes: int) -> np.ndarray:
    out = np.empty((arrays["d"].size, nbytes), np.uint8)
    out[:, 0:2] = arrays["d"].reshape(-1, 1).view(np.uint8)
    out[:, 2:4] = arrays["dmin"].reshape(-1, 1).view(np.uint8)
    out[:, 4:16] = _six_bit_scales(arrays)
    out[:, -128:] = arrays["q"].reshape(-1, 128)
    return out


def _q4_k(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return _k_block(arrays, 144).reshape(-1)


def _q5_k(arrays: dict[str, np.ndarray]) -> np.ndarray:
    out = _k_block(arrays, 176)
    out[:, 16:48] = arrays["qh"].reshape(-1, 32)
    return out.reshape(-1)


def _grouped(scales: np.ndarray, *fields: np.ndarray) -> np.ndarray:
    """Eight float16 scales, then the bytes of eight blocks; zeros after the last block."""
    blocks = scales.size
    width = sum(f.shape[-1] for f in fields)
    out = np.zeros((-(-blocks // 8), 16 + 8 * width), np.uint8)
    padded = np.zeros(len(out) * 8, np.float16)
    padded[:blocks] = scales.reshape(-1)
    out[:, :16] = padded.reshape(-1, 8).view(np.uint8)
    body = out[:, 16:].reshape(len(out), 8, width)
    whole, at = blocks // 8, 0
    for field in fields:
        end = at + field.shape[-1]
        body[:whole, :, at:end] = field[: whole * 8].reshape(whole, 8, end - at)
        if blocks % 8:
            body[whole, : blocks % 8, at:end] = field[whole * 8 :]
        at = end
    return out.reshape(-1)


def _q6_k(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return _grouped(
        arrays["d"],
        arrays["ql"].reshape(-1, 128),
        arrays["qh"].reshape(-1, 64),
        arrays["scales"].reshape(-1, 16).view(np.uint8),
    )


def _q8_0(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return _grouped(arrays["d"], arrays["q"].reshape(-1, 32).view(np.uint8))


_WRITERS = {
    GGMLType.F32: _plain,
    GGMLType.F16: _plain,
    GGMLType.BF16: _plain,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
