"""The arrangement of packed weights that the GPU decode kernel reads: an exact shuffle of ``rows``.

A tile is 8 rows x 256 columns (one superblock of 8 rows). Tiles of a matrix [N, K] are
numbered [N / 8, K / 256]; one lane of a warp owns one of the 8 rows and one of 4 groups of
64 neighbouring columns, which are two subblocks of 32 (``s``), each of two halves of 16
(``h``), each of four words (``j``) of four weights. All arrays begin with
[..., N / 8, K / 256]:

======  ==========================================================================
type    arrays (name: dtype [axes after the tile's])
======  ==========================================================================
Q4_K    ``q``: int32 [h, 8, 4, j], low nibbles s = 0, high nibbles s = 1;
        ``scales``: int32 [8, 4], bytes scale 0, scale 1, min 0, min 1;
        ``d``, ``dmin``: float16 [8]
Q5_K    as Q4_K, and ``qh``: int32 [h, 8, 4], bit j + 4 s of each byte
Q6_K    ``ql``: int32 [h, 8, 4, j], nibbles as Q4_K; ``qh``: int32 [8, 4, j], bits
        2 (2 h + s) of each byte; ``scales``: int32 [8, 4], int8 bytes 2 s + h;
        ``d``: float16 [8]
Q8_0    ``q``: int32 [2 s + h, 8, 4, j]; ``d0``, ``d1``: float16 [8, 4], of s = 0 and 1
Q2_K    ``q``: int32 [1, 8, 4, j], bits 2 (2 h + s) of each byte; ``scales``: int32 [8, 4],
        bytes 2 s + h, low a scale, high a minimum; ``d``, ``dmin``: float16 [8]
Q3_K    ``q`` as Q2_K; ``qh`` as Q5_K, the third bit; ``scales`` and ``d`` as Q6_K
Q4_0    ``q``: int32 [s, 8, 4, j], low nibbles h = 0, high nibbles h = 1; ``d0``, ``d1``
        as Q8_0
Q4_1    as Q4_0, and ``m0``, ``m1``: float16 [8, 4]
Q5_0    as Q4_0, and ``qh`` as Q5_K; Q5_1 as Q4_1, and ``qh``
IQ4_NL  ``q``: int32 [s, 8, 4, 4], nibbles in the order of columns, lowest first; ``d0``,
        ``d1`` as Q8_0
IQ4_XS  ``q`` as IQ4_NL; ``scales``: int16 [8, 4], int8 bytes s; ``d``: float16 [8]
MXFP4   ``q`` as IQ4_NL; ``e``: int16 [8, 4], bytes s
======  ==========================================================================

Sizes are the same as those of ``rows``: 148 bytes per superblock for Q4_K (144 in the file),
180 (176), 210 (210), 272 (272), 84 (84) of Q2_K, 114 (110) of Q3_K, 138 (136) of IQ4_XS. The
functions take any array module with NumPy's names (``numpy`` or ``jax.numpy``), so that the
shuffle can run where the bytes are.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.packed import GPU_TILES, ROWS, PackedTensor

TILE_ROWS = 8
TILED_TYPES = (
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q8_0,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.IQ4_NL,
    GGMLType.IQ4_XS,
    GGMLType.MXFP4,
)

Array = Any


def _words(xp: Any, b: Array) -> Array:
    """uint8 [..., 4] to int32 [...], the first byte lowest."""
    if xp is np:
        return np.ascontiguousarray(b).view(np.int32)[..., 0]
    b = b.astype(xp.uint32)
    w = b[..., 0] | (b[..., 1] << 8) | (b[..., 2] << 16) | (b[..., 3] << 24)
    return w.view(xp.int32)


def _shorts(xp: Any, b: Array) -> Array:
    """uint8 [..., 2] to int16 [...], the first byte lowest."""
    if xp is np:
        return np.ascontiguousarray(b).view(np.int16)[..., 0]
    b = b.astype(xp.uint16)
    return (b[..., 0] | (b[..., 1] << 8)).view(xp.int16)


def _split(a: Array, superblocks: int, *inner: int) -> Array:
    """[..., N, bytes] to [..., N / 8, superblocks, 8, *inner]."""
    *leading, rows, _ = a.shape
    a = a.reshape(*leading, rows // TILE_ROWS, TILE_ROWS, superblocks, *inner)
    return _move(a, len(leading) + 1, len(leading) + 2)


def _move(a: Array, source: int, target: int) -> Array:
    order = [i for i in range(a.ndim) if i != source]
    order.insert(target, source)
    return a.transpose(order)


def _file_bits(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> Array:
    """Q6_K weights 0..63 as uint8 [..., N / 8, superblocks, 8 rows, 256]."""
    ql = _split(arrays["ql"], superblocks, 2, 2, 32)
    qh = _split(arrays["qh"], superblocks, 2, 1, 32)
    quarters = [
        (ql[..., i % 2, :] >> (4 * (i // 2)) & 15) | ((qh[..., 0, :] >> (2 * i) & 3) << 4) for i in range(4)
    ]
    out = xp.stack(quarters, axis=-2)  # [..., half of 128, quarter of 32, 32]
    return out.reshape(*out.shape[:-3], SUPERBLOCK)


def _tile_q4(xp: Any, q: Array, superblocks: int) -> Array:
    b = _split(q, superblocks, 4, 2, 4, 4)  # 8 rows, group, half, word, byte
    return _words(xp, _move(b, b.ndim - 3, b.ndim - 5))


def _tile_mins(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    scales = _split(arrays["scales"], superblocks, 4, 2)
    mins = _split(arrays["mins"], superblocks, 4, 2)
    return {
        "scales": _words(xp, xp.concatenate([scales, mins], axis=-1)),
        "d": _split(arrays["d"], superblocks),
        "dmin": _split(arrays["dmin"], superblocks),
    }


def _tile_q5_high(xp: Any, qh: Array, superblocks: int) -> Array:
    # Byte l of a superblock holds bit 2 * group + s for weight l of subblock 2 * group + s.
    b = _split(qh, superblocks, 2, 4, 4)  # 8 rows, half, word j, byte
    groups = []
    for group in range(4):
        word = 0
        for s in range(2):
            for j in range(4):
                word = word | ((b[..., j, :] >> (2 * group + s) & 1) << (j + 4 * s))
        groups.append(_words(xp, word))  # [..., 8 rows, half]
    high = xp.stack(groups, axis=-1)  # [..., 8, half, 4]
    return _move(high, high.ndim - 2, high.ndim - 3)


def _tile_q6(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    w = _file_bits(xp, arrays, superblocks)
    w = w.reshape(*w.shape[:-1], 4, 2, 2, 4, 4)  # group, s, half, word, byte
    low = (w[..., 0, :, :, :] & 15) | ((w[..., 1, :, :, :] & 15) << 4)  # [..., 8, 4, half, word, byte]
    high = 0
    for half in range(2):
        for s in range(2):
            high = high | ((w[..., s, half, :, :] >> 4) << (2 * (2 * half + s)))
    scales = arrays["scales"].view(xp.uint8)
    return {
        "ql": _words(xp, _move(low, low.ndim - 3, low.ndim - 5)),
        "qh": _words(xp, high),
        "scales": _words(xp, _split(scales, superblocks, 4, 4)),  # file order 16 group + 2 s + half
        "d": _split(arrays["d"], superblocks),
    }


def _tile_q8(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    q = _split(arrays["q"].view(xp.uint8), superblocks, 4, 4, 4, 4)  # 8, group, 2 s + half, word, byte
    d = _split(arrays["d"], superblocks, 4, 2)
    return {"q": _words(xp, _move(q, q.ndim - 3, q.ndim - 5)), "d0": d[..., 0], "d1": d[..., 1]}


def _tile_two_bits(xp: Any, q: Array, superblocks: int) -> Array:
    # Bits 2 i of 32 bytes are the i-th 32 weights of 128.
    b = _split(q, superblocks, 2, 2, 4, 4)  # 8 rows, half of 256, half, word j, byte
    groups = []
    for group in range(4):
        word = 0
        for half in range(2):
            for s in range(2):
                bits = b[..., group // 2, half, :, :] >> (2 * (2 * (group % 2) + s)) & 3
                word = word | (bits << (2 * (2 * half + s)))
        groups.append(_words(xp, word))  # [..., 8 rows, j]
    return xp.stack(groups, axis=-2)[..., None, :, :, :]


def _tile_fifth_bits(xp: Any, qh: Array, superblocks: int) -> Array:
    # Bit 16 half + 4 j + i of a word is the fifth bit of weight i of word j.
    b = _split(qh, superblocks, 4, 2, 2, 2)  # 8 rows, group, s, half, byte
    halves = []
    for half in range(2):
        word = []
        for i in range(4):
            byte = 0
            for s in range(2):
                for j in range(4):
                    byte = byte | ((b[..., s, half, j // 2] >> (4 * (j % 2) + i) & 1) << (j + 4 * s))
            word.append(byte)
        halves.append(_words(xp, xp.stack(word, axis=-1)))  # [..., 8, 4]
    return xp.stack(halves, axis=-3)


def _tile_ordered(xp: Any, q: Array, superblocks: int) -> Array:
    b = _split(q, superblocks, 4, 2, 16)  # 8 rows, group, s, byte
    nibbles = xp.concatenate([b & 15, b >> 4], axis=-1)
    pairs = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    words = _words(xp, pairs.reshape(*pairs.shape[:-1], 4, 4))  # [..., 8, 4, s, word]
    return _move(words, words.ndim - 2, words.ndim - 4)


def _tile_pairs(arrays: Mapping[str, Array], name: str, superblocks: int) -> dict[str, Array]:
    """A number of each subblock, in two arrays."""
    both = _split(arrays[name], superblocks, 4, 2)
    return {f"{name}{s}": both[..., s] for s in range(2)}


def _tile_legacy(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    out = {"q": _tile_q4(xp, arrays["q"], superblocks)}
    if "qh" in arrays:
        out["qh"] = _tile_fifth_bits(xp, arrays["qh"], superblocks)
    for name in ("d", "m"):
        out |= _tile_pairs(arrays, name, superblocks) if name in arrays else {}
    return out


def _tile_of_table(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    """IQ4_NL, IQ4_XS and MXFP4."""
    out = {"q": _tile_ordered(xp, arrays["q"], superblocks)}
    for name in ("scales", "e"):
        if name in arrays:
            bytes_of = _split(arrays[name].view(xp.uint8), superblocks, 4, 2)
            out[name] = _shorts(xp, bytes_of)
    if "scales" in arrays:
        return out | {"d": _split(arrays["d"], superblocks)}
    return out | (_tile_pairs(arrays, "d", superblocks) if "d" in arrays else {})


def _tile_q2(xp: Any, arrays: Mapping[str, Array], superblocks: int) -> dict[str, Array]:
    """Q2_K and Q3_K."""
    out = {"q": _tile_two_bits(xp, arrays["q"], superblocks)}
    if "qh" in arrays:
        out["qh"] = _tile_q5_high(xp, arrays["qh"], superblocks)
    out["scales"] = _words(xp, _split(arrays["scales"].view(xp.uint8), superblocks, 4, 4))
    return out | {name: _split(arrays[name], superblocks) for name in ("d", "dmin") if name in arrays}


def to_gpu_tiles(packed: PackedTensor, xp: Any = np) -> PackedTensor:
    """Rearranges a ``rows`` tensor [..., N, K] into tiles.

    Args:
      packed: of a type in ``TILED_TYPES``, N a multiple of 8 and K of 256.
      xp: ``numpy``, or ``jax.numpy`` for JAX arrays (also inside ``jit``).

    Raises:
      NotImplementedError: type, layout or shape is not one that tiles hold.
    """
    if packed.layout != ROWS:
        raise NotImplementedError(f"GPU tiles are made from layout {ROWS!r}, not {packed.layout!r}")
    if packed.type not in TILED_TYPES:
        raise NotImplementedError(f"GPU tiles hold no {packed.type.name} weights")
    *_, rows, columns = packed.shape
    if rows % TILE_ROWS or columns % SUPERBLOCK:
        raise NotImplementedError(
            f"GPU tiles need rows in eights and columns in {SUPERBLOCK}s, not {packed.shape}"
        )
    n, arrays = columns // SUPERBLOCK, packed.arrays
    match packed.type:
        case GGMLType.Q4_K:
            out = {"q": _tile_q4(xp, arrays["q"], n), **_tile_mins(xp, arrays, n)}
        case GGMLType.Q5_K:
            out = {
                "q": _tile_q4(xp, arrays["q"], n),
                "qh": _tile_q5_high(xp, arrays["qh"], n),
                **_tile_mins(xp, arrays, n),
            }
        case GGMLType.Q6_K:
            out = _tile_q6(xp, arrays, n)
        case GGMLType.Q8_0:
            out = _tile_q8(xp, arrays, n)
        case GGMLType.Q2_K | GGMLType.Q3_K:
            out = _tile_q2(xp, arrays, n)
        case GGMLType.IQ4_NL | GGMLType.IQ4_XS | GGMLType.MXFP4:
            out = _tile_of_table(xp, arrays, n)
        case _:
            out = _tile_legacy(xp, arrays, n)
    if xp is np:
        out = {name: np.ascontiguousarray(a) for name, a in out.items()}
    return PackedTensor(out, packed.type, GPU_TILES)
