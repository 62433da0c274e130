"""Packed weights to float, in jnp: the meaning of every quantization type.

Float32 results equal ``qwen3_moe_jax.convert.unpack.dequantize`` bit for bit: the product of
a float16 scale, a 4- to 8-bit sub-scale and a quant fits 24 bits, so at most
one operation per weight rounds, whether the compiler fuses multiply and add or
not. The formulas are ggml's ``dequantize_row_*``:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import GPU_TILES, LANES16, ROWS, PackedTensor
from qwen3_moe_jax.kernels_pallas.packed import gpu_tiles as tiles
from qwen3_moe_jax.kernels_pallas.packed import grids
from qwen3_moe_jax.kernels_pallas.packed import lanes16 as lanes

_F32 = jnp.float32


def dequantize(w: PackedTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Dense weights ``[..., N, K]`` of a packed tensor, computed in float32 and rounded to ``dtype``.

    Raises:
      NotImplementedError: the layout has no jnp dequantizer.
    """
    if lanes.multiplies(w):
        return lanes.dequantize_columns(w, dtype).mT
    if w.layout == LANES16:
        w = lanes.in_rows(w)
    if w.layout == GPU_TILES:
        return tiles.dequantize_tiles(w).astype(dtype)
    if w.layout != ROWS:
        raise NotImplementedError(f"dequantize of layout={w.layout!r}")
    return _BY_TYPE[w.type](w).astype(dtype)


def plain_numbers(w: PackedTensor) -> jax.Array:
    """Weights that are numbers in the file (F32, F16, BF16) as an array of their dtype."""
    numbers = w.arrays["w"]
    return jax.lax.bitcast_convert_type(numbers, jnp.bfloat16) if w.type is GGMLType.BF16 else numbers


def _plain(w: PackedTensor) -> jax.Array:
    return plain_numbers(w).astype(_F32)


def _q8_0(w: PackedTensor) -> jax.Array:
    q, d = w.arrays["q"], w.arrays["d"]
    weights = q.reshape(*d.shape, 32).astype(_F32) * d.astype(_F32)[..., None]
    return weights.reshape(q.shape)


def _subblock_scales(w: PackedTensor, scales: str, d: str, per_superblock: int) -> jax.Array:
    """float32 [..., K/256, per_superblock]: sub-scale times superblock scale."""
    sub, whole = w.arrays[scales], w.arrays[d]
    return sub.astype(_F32).reshape(*whole.shape, per_superblock) * whole.astype(_F32)[..., None]


def _scale_and_shift(w: PackedTensor, quants: jax.Array) -> jax.Array:
    """Q4_K and Q5_K: quants [..., K/64, 2, 32] of 64-weight groups to weights."""
    shape = w.shape
    scales = _subblock_scales(w, "scales", "d", 8).reshape(quants.shape[:-1])
    mins = _subblock_scales(w, "mins", "dmin", 8).reshape(quants.shape[:-1])
    weights = quants.astype(_F32) * scales[..., None] - mins[..., None]
    return weights.reshape(shape)


def _nibbles(q: jax.Array, group: int) -> jax.Array:
    """uint8 [..., n * group] to [..., n, 2, group]: low halves of each group of bytes, then high halves."""
    grouped = q.reshape(*q.shape[:-1], -1, 1, group)
    return (grouped >> jnp.array([[0], [4]], jnp.uint8)) & jnp.uint8(15)


def _q4_k(w: PackedTensor) -> jax.Array:
    return _scale_and_shift(w, _nibbles(w.arrays["q"], 32))


def _q5_k(w: PackedTensor) -> jax.Array:
    low = _nibbles(w.arrays["q"], 32)
    qh = w.arrays["qh"]
    bits = (qh.reshape(*qh.shape[:-1], -1, 1, 32) >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & jnp.uint8(1)
    return _scale_and_shift(w, low | (bits.reshape(low.shape) << 4))


def _q6_k(w: PackedTensor) -> jax.Array:
    # Each half superblock (128 weights): 64 bytes of low nibbles, 32 bytes of four 2-bit highs.
    low = _nibbles(w.arrays["ql"], 64)
    qh = w.arrays["qh"]
    shifts = jnp.array([[0], [2], [4], [6]], jnp.uint8)
    high = (qh.reshape(*qh.shape[:-1], -1, 1, 32) >> shifts) & jnp.uint8(3)
    quants = (low | (high.reshape(low.shape) << 4)).astype(jnp.int8) - jnp.int8(32)
    scales = _subblock_scales(w, "scales", "d", 16)
    weights = quants.reshape(*scales.shape, 16).astype(_F32) * scales[..., None]
    return weights.reshape(w.shape)


def _two_bits(q: jax.Array) -> jax.Array:
    """uint8 [..., n * 32] to [..., n, 4, 32]: bits 2 s of 32 bytes are the s-th 32 weights of 128."""
    shifts = jnp.array([[0], [2], [4], [6]], jnp.uint8)
    return (q.reshape(*q.shape[:-1], -1, 1, 32) >> shifts) & jnp.uint8(3)


def _q2_k(w: PackedTensor) -> jax.Array:
    both, d, dmin = (w.arrays[name] for name in ("scales", "d", "dmin"))

    def scale(four_bits: jax.Array, whole: jax.Array) -> jax.Array:
        sub = four_bits.astype(_F32).reshape(*whole.shape, 16)
        return (sub * whole.astype(_F32)[..., None]).reshape(*both.shape, 1)

    quants = _two_bits(w.arrays["q"]).reshape(*both.shape, 16).astype(_F32)
    return (quants * scale(both & 15, d) - scale(both >> 4, dmin)).reshape(w.shape)


def _q3_k(w: PackedTensor) -> jax.Array:
    low, qh = _two_bits(w.arrays["q"]), w.arrays["qh"]
    bits = (qh.reshape(*qh.shape[:-1], -1, 1, 32) >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & jnp.uint8(1)
    quants = (low | (bits.reshape(low.shape) << 2)).astype(jnp.int8) - jnp.int8(4)
    scales = _subblock_scales(w, "scales", "d", 16)
    return (quants.reshape(*scales.shape, 16).astype(_F32) * scales[..., None]).reshape(w.shape)


def _of_table(nibbles: jax.Array) -> jax.Array:
    """The values that 4-bit numbers choose, float32."""
    return jnp.array(VALUES, _F32)[nibbles]


def _iq4_xs(w: PackedTensor) -> jax.Array:
    scales = _subblock_scales(w, "scales", "d", 8)
    values = _of_table(_nibbles(w.arrays["q"], 16)).reshape(*scales.shape, 32)
    return (values * scales[..., None]).reshape(w.shape)


def _scaled(w: PackedTensor, quants: jax.Array) -> jax.Array:
    """Types with one float16 scale, and perhaps a minimum, for 32 weights."""
    blocks = quants.reshape(*w.arrays["d"].shape, 32).astype(_F32)
    weights = blocks * w.arrays["d"].astype(_F32)[..., None]
    if "m" in w.arrays:
        weights = weights + w.arrays["m"].astype(_F32)[..., None]
    return weights.reshape(w.shape)


def _iq4_nl(w: PackedTensor) -> jax.Array:
    return _scaled(w, _of_table(_nibbles(w.arrays["q"], 16)))


def _five_bits(w: PackedTensor) -> jax.Array:
    low, qh = _nibbles(w.arrays["q"], 16), w.arrays["qh"]
    bits = (qh[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & jnp.uint8(1)
    return low | (bits.reshape(low.shape) << 4)


def _q4_0(w: PackedTensor) -> jax.Array:
    return _scaled(w, _nibbles(w.arrays["q"], 16).astype(jnp.int8) - jnp.int8(8))


def _q5_0(w: PackedTensor) -> jax.Array:
    return _scaled(w, _five_bits(w).astype(jnp.int8) - jnp.int8(16))


def _q4_1(w: PackedTensor) -> jax.Array:
    return _scaled(w, _nibbles(w.arrays["q"], 16))


def _q5_1(w: PackedTensor) -> jax.Array:
    return _scaled(w, _five_bits(w))


_BY_TYPE = {
    GGMLType.F32: _plain,
    GGMLType.F16: _plain,
    GGMLType.BF16: _plain,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    **grids.BY_TYPE,
}
