"""Dequantizers, in jnp, of MXFP4, of the ternary types and of those whose weights are points of a grid.

The formulas are ggml's ``dequantize_row_*``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c.
What the bits of each array are is said in the type's module of :mod:`qwen3_moe_jax.convert.formats`.
"""

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.formats.grids import GRIDS
from qwen3_moe_jax.convert.formats.iq1 import DELTA
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.convert.formats.ternary import POWERS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor

_F32 = jnp.float32


def _parts(q: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """Bit fields of every element: [..., n] to [..., n * len(shifts)], the element's dtype."""
    fields = (q[..., None] >> jnp.array(shifts, q.dtype)) & q.dtype.type(mask)
    return fields.reshape(*q.shape[:-1], -1)


def _superblock_scale(w: PackedTensor, factors: jax.Array) -> jax.Array:
    """``d * factors``: float32 [..., K / n] of one factor for n weights."""
    d = w.arrays["d"].astype(_F32)
    factors = factors.astype(_F32).reshape(*d.shape, -1)
    return (d[..., None] * factors).reshape(*d.shape[:-1], -1)


def _scaled(w: PackedTensor, values: jax.Array, scales: jax.Array) -> jax.Array:
    """Weights [..., K] of as many values, one scale for each run of them."""
    runs = values.astype(_F32).reshape(*scales.shape, -1)
    return (runs * scales[..., None]).reshape(w.shape)


def _points(grid: str, index: jax.Array) -> jax.Array:
    """int8 [..., n, 4 or 8]: points of a grid."""
    return jnp.array(GRIDS[grid])[index.astype(jnp.int32)]


def _signed(points: jax.Array, signs: jax.Array) -> jax.Array:
    """int8 [..., K]: points [..., n, weights] with sign bytes [..., K / 8]."""
    bits = _parts(signs, tuple(range(8)), 1).astype(jnp.int8)
    return points.reshape(bits.shape) * (jnp.int8(1) - (bits << 1))


def _with_parity(seven: jax.Array) -> jax.Array:
    """Sign bytes uint8 of seven bits: the eighth makes their number even."""
    seven = seven.astype(jnp.uint8)
    return seven | (jax.lax.population_count(seven) & jnp.uint8(1)) << 7


def _shared_signs(words: jax.Array) -> jax.Array:
    """Sign bytes [..., 4 n] of words uint32 [..., n]: four times seven bits each."""
    return _with_parity(_parts(words, (0, 7, 14, 21), 127))


def _odd_halves(w: PackedTensor, scales: jax.Array, unit: float) -> jax.Array:
    """``d * (0.5 + scale) * unit``."""
    return _superblock_scale(w, (0.5 + scales.astype(_F32)) * unit)


def fp4_scale(e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """2^(e - 128) of uint8, float32, in two factors.

    None of these is subnormal: a processor may take such a number for zero.
    """
    e = e.astype(jnp.uint32)
    small = jnp.where(e < 2, (e + 125) << 23, 127 << 23)  # 2^(e - 2), else 1
    large = (jnp.maximum(e, 2) - 1) << 23  # 2^(e - 128)
    return jax.lax.bitcast_convert_type(small, _F32), jax.lax.bitcast_convert_type(large, _F32)


def _fp4(w: PackedTensor) -> jax.Array:
    e = w.arrays["e"]
    small, large = (factor[..., None] for factor in fp4_scale(e))
    q = w.arrays["q"].reshape(*e.shape, 1, 16)
    nibbles = ((q >> jnp.array([[0], [4]], jnp.uint8)) & jnp.uint8(15)).reshape(*e.shape, 32)
    return (jnp.array(FP4_VALUES, _F32)[nibbles] * small * large).reshape(w.shape)


def _iq3_s(w: PackedTensor) -> jax.Array:
    ninth = _parts(w.arrays["qh"], tuple(range(8)), 1).astype(jnp.uint16) << 8
    points = _signed(_points("IQ3_S", w.arrays["q"] | ninth), w.arrays["signs"])
    scales = _parts(w.arrays["scales"], (0, 4), 15)
    return _scaled(w, points, _superblock_scale(w, 1 + 2 * scales))


def _iq3_xxs(w: PackedTensor) -> jax.Array:
    words = w.arrays["signs"]
    points = _signed(_points("IQ3_XXS", w.arrays["q"]), _shared_signs(words))
    return _scaled(w, points, _odd_halves(w, words >> 28, 0.5))


def _iq2_s(w: PackedTensor) -> jax.Array:
    high = _parts(w.arrays["qh"], (0, 2, 4, 6), 3).astype(jnp.uint16) << 8
    points = _signed(_points("IQ2_S", w.arrays["q"] | high), w.arrays["signs"])
    return _scaled(w, points, _odd_halves(w, _parts(w.arrays["scales"], (0, 4), 15), 0.25))


def _iq2_xs(w: PackedTensor) -> jax.Array:
    q = w.arrays["q"]
    points = _signed(_points("IQ2_XS", q & 511), _with_parity(q >> 9))
    return _scaled(w, points, _odd_halves(w, _parts(w.arrays["scales"], (0, 4), 15), 0.25))


def _iq2_xxs(w: PackedTensor) -> jax.Array:
    words = w.arrays["signs"]
    points = _signed(_points("IQ2_XXS", w.arrays["q"]), _shared_signs(words))
    return _scaled(w, points, _odd_halves(w, words >> 28, 0.25))


def _moved(index: jax.Array, is_down: jax.Array) -> jax.Array:
    """float32 [..., n, 8]: points of IQ1, each moved by an eighth."""
    return _points("IQ1", index).astype(_F32) + jnp.where(is_down, -DELTA, DELTA)[..., None]


def _iq1_s(w: PackedTensor) -> jax.Array:
    words = w.arrays["qh"]
    index = w.arrays["q"] | _parts(words, (0, 3, 6, 9), 7) << 8
    moved = _moved(index, _parts(words, (15,) * 4, 1) != 0)
    return _scaled(w, moved, _superblock_scale(w, 2 * (words >> 12 & 7) + 1))


def _iq1_m(w: PackedTensor) -> jax.Array:
    fours = _parts(w.arrays["qh"], (0, 4), 15)
    moved = _moved(w.arrays["q"] | (fours & 7).astype(jnp.uint16) << 8, fours > 7)
    pairs = w.arrays["scales"].astype(jnp.uint16).reshape(*fours.shape[:-1], -1, 2)
    scales = _parts(pairs[..., 0] | pairs[..., 1] << 8, (0, 3, 6, 9), 7)
    return _scaled(w, moved, _superblock_scale(w, 2 * scales + 1))


def _digits(q: jax.Array, count: int, superblock: int) -> jax.Array:
    """int8 [..., K / 256, count * superblock]: the first digits of a superblock's bytes, then the second."""
    shifted = q.reshape(*q.shape[:-1], -1, 1, superblock) * jnp.array(POWERS[:count], jnp.uint8)[:, None]
    digits = (shifted.astype(jnp.uint16) * 3 >> 8).astype(jnp.int8)
    return digits.reshape(*digits.shape[:-2], -1)


def _tq1_0(w: PackedTensor) -> jax.Array:
    parts = [
        _digits(w.arrays[name], *of) for name, of in {"q": (5, 32), "q16": (5, 16), "qh": (4, 4)}.items()
    ]
    return _scaled(w, jnp.concatenate(parts, axis=-1) - jnp.int8(1), w.arrays["d"].astype(_F32))


def _tq2_0(w: PackedTensor) -> jax.Array:
    q = w.arrays["q"]
    shifts = jnp.array([[0], [2], [4], [6]], jnp.uint8)
    digits = (q.reshape(*q.shape[:-1], -1, 1, 32) >> shifts) & jnp.uint8(3)
    return _scaled(w, digits.astype(jnp.int8) - jnp.int8(1), w.arrays["d"].astype(_F32))


BY_TYPE = {
    GGMLType.MXFP4: _fp4,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
"""The float32 weights of packed rows, by type."""
