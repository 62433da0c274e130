"""Blocks as a file has them to packed arrays, in jnp: what ``convert.unpack`` does on a host, bit for bit.

Bytes are moved and scales of 4 to 6 bits spread; nothing is rounded. Fields and their offsets are those of
``convert.formats``; only types whose scales are spread have code of their own here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS, SCALE_NAMES
from qwen3_moe_jax.convert.formats.base import Field, Format
from qwen3_moe_jax.convert.formats.mxfp4 import MAX_EXPONENT
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor, array_shapes

_Arrays = dict[str, jax.Array]


def unpacks(ggml_type: GGMLType) -> bool:
    """Whether :func:`unpack_blocks` knows this type."""
    return FORMATS[ggml_type].unpack is None or ggml_type in _SPREAD


def unpack_blocks(blocks: jax.Array, ggml_type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Packed arrays of layout "rows".

    Args:
      blocks: uint8 [bytes], whole blocks as a file has them.
      ggml_type: a type that :func:`unpacks`.
      shape: logical shape [..., N, K] of these blocks.
    """
    form = FORMATS[ggml_type]
    blocks = blocks.reshape(-1, form.block.nbytes)
    spread = _SPREAD[ggml_type](blocks, form) if ggml_type in _SPREAD else {}
    arrays: _Arrays = {}
    for name, array_shape in array_shapes(ggml_type, shape).items():
        field = spread[name] if name in spread else _field(blocks, form.block.fields[name])
        arrays[name] = field.reshape(array_shape)
    return PackedTensor(arrays, ggml_type)


def first_nonfinite(packed: PackedTensor) -> jax.Array:
    """int32 [number of arrays with floats]: the first block of each with a NaN or an infinity, or -1.

    The arrays are those of ``convert.formats.SCALE_NAMES``, in the order of the type's own.
    """
    form = FORMATS[packed.type]
    found: list[jax.Array] = []
    for name, array in form.arrays.items():
        if name in SCALE_NAMES:
            per_block = form.block.weights // array.weights
            bad = _is_nonfinite(packed.arrays[name], array.dtype).reshape(-1, per_block).any(axis=1)
            found.append(jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32))
    return jnp.stack(found) if found else jnp.zeros((0,), jnp.int32)


_EXPONENTS = {
    "float16": (jnp.uint16, 0x7C00),
    "uint16": (jnp.uint16, 0x7F80),
    "float32": (jnp.uint32, 0x7F800000),
}
"""Integers of a number's size, and the bits of its exponent: all are set in a NaN or an infinity."""


def _is_nonfinite(values: jax.Array, dtype: str) -> jax.Array:
    if dtype == "uint8":
        return values > MAX_EXPONENT
    words, mask = _EXPONENTS[dtype]
    return jax.lax.bitcast_convert_type(values, words) & words(mask) == words(mask)


def _field(blocks: jax.Array, field: Field) -> jax.Array:
    """One field of every block, [blocks, count], of the field's dtype."""
    raw = blocks[:, field.offset : field.offset + field.nbytes]
    dtype = np.dtype(field.dtype)
    if dtype == np.uint8:
        return raw
    if dtype.itemsize > 1:
        raw = raw.reshape(len(raw), field.count, dtype.itemsize)
    return jax.lax.bitcast_convert_type(raw, dtype.newbyteorder("="))


def _spread_six_bits(blocks: jax.Array, form: Format) -> _Arrays:
    """Q4_K and Q5_K, as ``convert.formats.q4_k.spread_scales``."""
    packed = _field(blocks, form.block.fields["scales"]).reshape(-1, 3, 4)
    low_scales, low_mins, high = packed[:, 0], packed[:, 1], packed[:, 2]
    six, four, two = jnp.uint8(0x3F), jnp.uint8(0x0F), jnp.uint8(0x30)
    scales = [low_scales & six, (high & four) | ((low_scales >> 2) & two)]
    mins = [low_mins & six, ((high >> 4) & four) | ((low_mins >> 2) & two)]
    return {"scales": jnp.concatenate(scales, axis=1), "mins": jnp.concatenate(mins, axis=1)}


def _signed_six_bits(low: jax.Array, high: jax.Array) -> jax.Array:
    """Four low and two high bits, less 32: int8."""
    return jax.lax.bitcast_convert_type(low | (high << 4), jnp.int8) - jnp.int8(32)


def _spread_q3_k(blocks: jax.Array, form: Format) -> _Arrays:
    packed = _field(blocks, form.block.fields["scales"])
    low, high = packed[:, None, :8], packed[:, None, 8:]
    low = (low >> jnp.array([[0], [4]], jnp.uint8)) & jnp.uint8(0x0F)
    high = (high >> jnp.array([[0], [2], [4], [6]], jnp.uint8)) & jnp.uint8(3)
    return {"scales": _signed_six_bits(low.reshape(-1, 16), high.reshape(-1, 16))}


def _spread_iq4_xs(blocks: jax.Array, form: Format) -> _Arrays:
    low, high = (_field(blocks, form.block.fields[name]) for name in ("scales_l", "scales_h"))
    low = ((low[:, :, None] >> jnp.array([0, 4], jnp.uint8)) & jnp.uint8(0x0F)).reshape(-1, 8)
    high = ((high >> jnp.arange(0, 16, 2, dtype=jnp.uint16)) & jnp.uint16(3)).astype(jnp.uint8)
    return {"scales": _signed_six_bits(low, high)}


def _spread_iq1_m(blocks: jax.Array, form: Format) -> _Arrays:
    scales = _field(blocks, form.block.fields["scales"])
    words = jax.lax.bitcast_convert_type(scales.reshape(-1, 4, 2), jnp.uint16)
    fours = (words >> 12) << jnp.arange(0, 16, 4, dtype=jnp.uint16)
    whole = fours[:, 0] | fours[:, 1] | fours[:, 2] | fours[:, 3]
    return {"d": jax.lax.bitcast_convert_type(whole, jnp.float16)}


def _spread_iq2_xxs(blocks: jax.Array, form: Format) -> _Arrays:
    pairs = _field(blocks, form.block.fields["pairs"]).reshape(-1, 8, 2)
    return {"q": jax.lax.bitcast_convert_type(pairs[:, :, 0], jnp.uint8), "signs": pairs[:, :, 1]}


_SPREAD: dict[GGMLType, Callable[[jax.Array, Format], _Arrays]] = {
    GGMLType.Q4_K: _spread_six_bits,
    GGMLType.Q5_K: _spread_six_bits,
    GGMLType.Q3_K: _spread_q3_k,
    GGMLType.IQ4_XS: _spread_iq4_xs,
    GGMLType.IQ1_M: _spread_iq1_m,
    GGMLType.IQ2_XXS: _spread_iq2_xxs,
}
"""Types whose arrays are not all fields of their blocks."""
