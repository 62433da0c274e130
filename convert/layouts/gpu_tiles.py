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
======  ==========================================================================

Sizes are the same as those of ``rows``: 148 bytes per superblock for Q4_K (144 in the file),
180 (176), 210 (210), 272 (272). The functions take any array module with NumPy's names
(``numpy`` or ``jax.numpy``), so that the shuffle can run where the bytes are.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.packed import GPU_TILES, ROWS, PackedTensor

TILE_ROWS = 8
TILED_TYPES = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0)

Array = Any


def _words(xp: Any, b: Array) -> Array:
    """uint8 [..., 4] to int32 [...], the first byte lowest."""
    if xp is np:
        return np.ascontiguousarray(b).view(np.int32)[..., 0]
    b = b.astype(xp.uint32)
    w = b[..., 0] | (b[..., 1] << 8) | (b[..., 2] << 16) | (b[..., 3] << 24)
    return w.view(xp.int32)


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
        case _:
            out = _tile_q8(xp, arrays, n)
    if xp is np:
        out = {name: np.ascontiguousarray(a) for name, a in out.items()}
    return PackedTensor(out, packed.type, GPU_TILES)
