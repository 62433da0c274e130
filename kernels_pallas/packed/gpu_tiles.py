"""Weights of layout "gpu_tiles" to float, in jnp: for operations that have no kernel of their own.

The arrays are those of ``convert.layouts.gpu_tiles``; a lane's 64 columns are numbered
[subblock s, half h, word j, byte]. Arithmetic is that of ``dequantize``.
"""

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor

_F32 = jnp.float32


def dequantize_tiles(w: PackedTensor) -> jax.Array:
    """float32 [..., N, K], bit for bit what ``dequantize`` gives of the same weights in layout "rows"."""
    quants, scales, shifts = _BY_TYPE[w.type](w.arrays)  # [..., T, S, 8, group, s, h, 16], and scales of it
    weights = quants * scales if shifts is None else quants * scales - shifts
    *leading, tiles, superblocks, rows, _, _, _, _ = weights.shape
    weights = jnp.moveaxis(weights, -5, -6)  # rows before superblocks
    return weights.reshape(*leading, tiles * rows, superblocks * 256)


def _bytes(words: jax.Array) -> jax.Array:
    """int32 [...] -> uint8 [..., 4], the lowest byte first."""
    return jax.lax.bitcast_convert_type(words, jnp.uint8)


def _two_subblocks(words: jax.Array) -> jax.Array:
    """Nibbles int32 [..., h, 8, group, j] -> uint8 [..., 8, group, s, h, 16]."""
    b = _bytes(jnp.moveaxis(words, -4, -2))  # [..., 8, group, h, j, byte]
    both = jnp.stack([b & 15, b >> 4], axis=-4)
    return both.reshape(*both.shape[:-2], 16)


def _d(arrays, name: str) -> jax.Array:
    """float16 [..., 8] -> float32, over [8, group, s, h, 16]."""
    return arrays[name].astype(_F32)[..., None, None, None, None]


def _scale_and_min(arrays) -> tuple[jax.Array, jax.Array]:
    sub = _bytes(arrays["scales"]).astype(_F32)[..., None, None]  # [..., 8, group, 4, 1, 1]
    return sub[..., :2, :, :] * _d(arrays, "d"), sub[..., 2:, :, :] * _d(arrays, "dmin")


def _q4_k(arrays) -> tuple:
    return _two_subblocks(arrays["q"]).astype(_F32), *_scale_and_min(arrays)


def _q5_k(arrays) -> tuple:
    low = _two_subblocks(arrays["q"])
    high = _bytes(jnp.moveaxis(arrays["qh"], -3, -1))[..., None, :]  # [..., 8, group, h, 1, byte]
    bits = [(high >> jnp.arange(4 * s, 4 * s + 4, dtype=jnp.uint8)[:, None]) & 1 for s in range(2)]
    bits = jnp.stack(bits, axis=-4)  # [..., 8, group, s, h, j, byte]
    quants = low | (bits.reshape(low.shape) << 4)
    return quants.astype(_F32), *_scale_and_min(arrays)


def _q6_k(arrays) -> tuple:
    low = _two_subblocks(arrays["ql"])
    high = _bytes(arrays["qh"])[..., None, None, :, :]  # [..., 8, group, 1, 1, j, byte]
    shift = jnp.array([[0, 4], [2, 6]], jnp.uint8)[:, :, None, None]  # 2 (2 h + s) at [s, h]
    quants = low | (((high >> shift) & 3).reshape(low.shape) << 4)
    scales = jax.lax.bitcast_convert_type(arrays["scales"], jnp.int8).astype(_F32)
    scales = scales.reshape(*scales.shape[:-1], 2, 2, 1)  # bytes 2 s + h
    return quants.astype(_F32) - 32, scales * _d(arrays, "d"), None


def _q8_0(arrays) -> tuple:
    q = jax.lax.bitcast_convert_type(
        jnp.moveaxis(arrays["q"], -4, -2), jnp.int8
    )  # [..., 8, group, 2 s + h, j, b]
    q = q.reshape(*q.shape[:-3], 2, 2, 16)
    d = jnp.stack([arrays["d0"], arrays["d1"]], axis=-1).astype(_F32)
    return q.astype(_F32), d[..., None, None], None


_BY_TYPE = {
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.Q8_0: _q8_0,
}
