"""Weights of layout "gpu_tiles" to float, in jnp: for operations that have no kernel of their own.

The arrays are those of ``convert.layouts.gpu_tiles``; a lane's 64 columns are numbered
[subblock s, half h, word j, byte]. Arithmetic is that of ``dequantize``.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.packed import grids

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
    quants = low | (_upper_bits(arrays["qh"], low) << 4)
    return quants.astype(_F32), *_scale_and_min(arrays)


def _q6_k(arrays) -> tuple:
    low = _two_subblocks(arrays["ql"])
    high = _bytes(arrays["qh"])[..., None, None, :, :]  # [..., 8, group, 1, 1, j, byte]
    shift = jnp.array([[0, 4], [2, 6]], jnp.uint8)[:, :, None, None]  # 2 (2 h + s) at [s, h]
    quants = low | (((high >> shift) & 3).reshape(low.shape) << 4)
    return quants.astype(_F32) - 32, _signed_scales(arrays), None


def _q8_0(arrays) -> tuple:
    q = jax.lax.bitcast_convert_type(
        jnp.moveaxis(arrays["q"], -4, -2), jnp.int8
    )  # [..., 8, group, 2 s + h, j, b]
    q = q.reshape(*q.shape[:-3], 2, 2, 16)
    return q.astype(_F32), _of_subblocks(arrays, "d"), None


def _two_bits(words: jax.Array) -> jax.Array:
    """int32 [..., 1, 8, group, j] -> uint8 [..., 8, group, s, h, 16], bits 2 (2 h + s) of each byte."""
    b = _bytes(words[..., 0, :, :, :])[..., None, None, :, :]
    shift = jnp.array([[0, 4], [2, 6]], jnp.uint8)[:, :, None, None]
    both = (b >> shift) & 3
    return both.reshape(*both.shape[:-2], 16)


def _upper_bits(qh: jax.Array, low: jax.Array) -> jax.Array:
    """uint8 of the shape of ``low`` [..., 8, group, s, h, 16]: bit j + 4 s of each byte of a half's word."""
    high = _bytes(jnp.moveaxis(qh, -3, -1))[..., None, :]  # [..., 8, group, h, 1, byte]
    bits = [(high >> jnp.arange(4 * s, 4 * s + 4, dtype=jnp.uint8)[:, None]) & 1 for s in range(2)]
    return jnp.stack(bits, axis=-4).reshape(low.shape)


def _q2_k(arrays) -> tuple:
    both = _bytes(arrays["scales"]).reshape(*arrays["scales"].shape, 2, 2, 1)
    scale, minimum = (both & 15).astype(_F32), (both >> 4).astype(_F32)
    return _two_bits(arrays["q"]).astype(_F32), scale * _d(arrays, "d"), minimum * _d(arrays, "dmin")


def _signed_scales(arrays) -> jax.Array:
    """Int8 bytes 2 s + h times d: float32 [..., 8, group, s, h, 1]."""
    scales = jax.lax.bitcast_convert_type(arrays["scales"], jnp.int8).astype(_F32)
    return scales.reshape(*scales.shape[:-1], 2, 2, 1) * _d(arrays, "d")


def _q3_k(arrays) -> tuple:
    low = _two_bits(arrays["q"])
    quants = low | (_upper_bits(arrays["qh"], low) << 2)
    return quants.astype(_F32) - 4, _signed_scales(arrays), None


def _of_subblocks(arrays, name: str) -> jax.Array:
    """float16 [..., 8, group] of each subblock -> float32 [..., 8, group, s, 1, 1]."""
    return jnp.stack([arrays[f"{name}{s}"] for s in range(2)], axis=-1).astype(_F32)[..., None, None]


def _legacy(center: int, arrays) -> tuple:
    low = jnp.swapaxes(_two_subblocks(arrays["q"]), -2, -3)  # vectors are subblocks, nibbles halves
    if "qh" in arrays:
        low = low | (_upper_bits(arrays["qh"], low) << 4)
    minimum = -_of_subblocks(arrays, "m") if "m0" in arrays else None
    return low.astype(_F32) - center, _of_subblocks(arrays, "d"), minimum


def _of_table(table: tuple[int, ...], words: jax.Array) -> jax.Array:
    """int32 [..., s, 8, group, 4] of nibbles in order -> float32 [..., 8, group, s, h, 16]."""
    b = _bytes(jnp.moveaxis(words, -4, -2))[..., None]  # [..., 8, group, s, word, byte, 1]
    nibbles = (b >> jnp.array([0, 4], jnp.uint8)) & 15
    return jnp.array(table, _F32)[nibbles.reshape(*nibbles.shape[:-3], 2, 16)]


def _iq4_nl(arrays) -> tuple:
    return _of_table(VALUES, arrays["q"]), _of_subblocks(arrays, "d"), None


def _iq4_xs(arrays) -> tuple:
    scales = jax.lax.bitcast_convert_type(arrays["scales"], jnp.int8).astype(_F32)
    return _of_table(VALUES, arrays["q"]), scales[..., None, None] * _d(arrays, "d"), None


def _mxfp4(arrays) -> tuple:
    factors = grids.fp4_scale(jax.lax.bitcast_convert_type(arrays["e"], jnp.uint8))
    small, large = (factor[..., None, None] for factor in factors)
    return _of_table(FP4_VALUES, arrays["q"]) * small, large, None


_BY_TYPE = {
    GGMLType.Q4_0: partial(_legacy, 8),
    GGMLType.Q4_1: partial(_legacy, 0),
    GGMLType.Q5_0: partial(_legacy, 16),
    GGMLType.Q5_1: partial(_legacy, 0),
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.Q8_0: _q8_0,
}
