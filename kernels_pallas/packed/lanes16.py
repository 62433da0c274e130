"""Products with weights of layout ``"lanes16"``: the CPU's fast path for few tokens.

XLA's CPU backend makes scalar code of any sum inside a fusion, and vector code
of flat elementwise loops. So the sum over the columns of a group of weights is
written out term by term, with sixteen rows as the loop that becomes one vector
instruction. Every term takes a byte out of a word of sixteen rows, converts
it, and multiplies it by one element of x; scales apply to whole groups. Weights are
never written to memory in float.

A group is what one element of the first pass covers: 64 weights of Q4_K, Q5_K
and Q6_K, 32 of Q8_0. The second pass adds the groups of a row.

Other types have this layout for the CPU's own kernels; here they go back to rows first.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, LANES, LANES16, ROWS, PackedTensor

_F32 = jnp.float32
_MAX_TERMS = 64

Take = Callable[[jax.Array], jax.Array]
"""Picks what a product needs along the leading axes: all of a matrix, or the experts of each row."""


def multiplies(w: PackedTensor) -> bool:
    """Whether :func:`matvec` and :func:`dequantize_columns` take this tensor."""
    return w.layout == LANES16 and w.type in _GROUPS


def in_rows(w: PackedTensor) -> PackedTensor:
    """A packed [..., N, K] in layout "lanes16", in layout "rows"."""

    def separate(name: str, array: jax.Array) -> jax.Array:
        array = array.mT  # [..., tiles, 16, elements]
        dtype = jnp.dtype(ARRAY_FORMATS[w.type][name].dtype)
        if dtype.itemsize == 1:
            array = lax.bitcast_convert_type(array, dtype)
        return array.reshape(*w.shape[:-1], -1)

    return PackedTensor({name: separate(name, array) for name, array in w.arrays.items()}, w.type, ROWS)


def rows(w: PackedTensor, indices: jax.Array) -> PackedTensor:
    """Single rows of a packed [N, K] in layout "lanes16", as packed [T, K] in layout "rows"."""

    def pick(name: str, array: jax.Array) -> jax.Array:
        picked = array[indices // LANES, :, indices % LANES]
        dtype = jnp.dtype(ARRAY_FORMATS[w.type][name].dtype)
        if dtype.itemsize == 1:
            picked = lax.bitcast_convert_type(picked, dtype).reshape(picked.shape[0], -1)
        return picked

    return PackedTensor({name: pick(name, array) for name, array in w.arrays.items()}, w.type, ROWS)


def matvec(x: jax.Array, w: PackedTensor, ids: jax.Array | None = None) -> jax.Array:
    """Products of rows of x with packed matrices.

    Args:
      x: float32 [R, K].
      w: packed [N, K], or [E, N, K] with ``ids``, in layout "lanes16".
      ids: int32 [R], the matrix of each row.

    Returns:
      float32 [R, N].
    """

    def take(a: jax.Array) -> jax.Array:
        return a[None] if ids is None else a.at[ids].get(mode="clip")

    # Without the barriers XLA fuses the passes with each other and with what follows, and so
    # computes every group several times.
    x = lax.optimization_barrier(x.astype(_F32))
    partial_sums = lax.optimization_barrier(_GROUPS[w.type](x, w, take))  # [R, N/16, groups, 16]
    return lax.optimization_barrier(_sum_groups(partial_sums).reshape(x.shape[0], -1))


def _sum_groups(partial_sums: jax.Array) -> jax.Array:
    """[R, tiles, groups, 16] -> [R, tiles, 16], written out so that it is vector code."""
    groups = partial_sums.shape[2]
    if groups > _MAX_TERMS:
        inner = next(n for n in range(_MAX_TERMS, 0, -1) if groups % n == 0)
        split = partial_sums.reshape(*partial_sums.shape[:2], groups // inner, inner, LANES)
        if inner > 1:
            return _sum_groups(_add(split[:, :, :, i] for i in range(inner)))
        return partial_sums.sum(axis=2)
    return _add(partial_sums[:, :, i] for i in range(groups))


def _add(terms) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _words(array: jax.Array, *group: int) -> jax.Array:
    """uint32 [..., tiles, words, 16] -> [..., tiles, groups, *group, 16]."""
    return array.reshape(*array.shape[:-2], -1, *group, LANES)


def _byte(words: jax.Array, index: int) -> jax.Array:
    """Byte ``index`` of every word, as float32."""
    return ((words >> jnp.uint32(8 * index)) & jnp.uint32(255)).astype(jnp.int32).astype(_F32)


def _top_byte(words: jax.Array, to_top: jax.Array | np.ndarray) -> jax.Array:
    """The byte that multiplication by the power of two ``to_top`` brings to the top of a word, as float32."""
    return ((words * to_top) >> 24).astype(jnp.int32).astype(_F32)


def _top_signed_byte(words: jax.Array, to_top: jax.Array | np.ndarray | np.uint32) -> jax.Array:
    """As :func:`_top_byte`, for a signed byte."""
    return ((words * to_top).astype(jnp.int32) >> 24).astype(_F32)


def _repeat(array: jax.Array, repeats: int) -> jax.Array:
    """[..., n, 16] -> [..., n * repeats, 16], each element repeated."""
    *leading, n, lanes = array.shape
    wide = jnp.broadcast_to(array[..., None, :], (*leading, n, repeats, lanes))
    return wide.reshape(*leading, n * repeats, lanes)


def _shifts(values: list[int], groups: int) -> jax.Array:
    """uint32 [groups, 1] of powers of two that repeat: left shifts that differ from group to group.

    XLA guards a shift by a loaded amount against amounts above 31, which keeps
    LLVM from making vectors of it; a multiplication needs no guard.
    """
    return jnp.tile(jnp.array([1 << v for v in values], jnp.uint32), groups // len(values))[:, None]


def _pair_of_scales(array: jax.Array, take: Take) -> tuple[jax.Array, jax.Array]:
    """Words of four 6-bit scales [..., K/128, 16] -> scales of low and high halves, [..., K/64, 16] each."""
    word = take(_repeat(array, 2))
    groups = word.shape[-2]
    return _top_byte(word, _shifts([24, 8], groups)), _top_byte(word, _shifts([16, 0], groups))


def _x_term(x: jax.Array, *index: int) -> jax.Array:
    """x [R, groups, ...] at ``index`` of a group, ready to multiply [R, tiles, groups, 16]."""
    return x[(slice(None), slice(None), *index)][:, None, :, None]


_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_TWO_BITS = np.uint32(0x03030303)


def _q4_k(x: jax.Array, w: PackedTensor, take: Take) -> jax.Array:
    q = _words(w.arrays["q"], 8)

    def halves(a: int) -> tuple[jax.Array, jax.Array]:
        word = take(q[..., a, :])
        return word & _LOW_NIBBLES, (word >> 4) & _LOW_NIBBLES

    return _scaled_pairs(x, w, take, halves)


def _q5_k(x: jax.Array, w: PackedTensor, take: Take) -> jax.Array:
    q = _words(w.arrays["q"], 8)
    qh = _words(w.arrays["qh"], 8)  # one group of bits for four groups of nibbles
    # bits 2c and 2c + 1 of a byte belong to the c-th 64 weights of the superblock
    to_top = _shifts([6, 4, 2, 0], q.shape[-3])

    def halves(a: int) -> tuple[jax.Array, jax.Array]:
        word, bits = take(q[..., a, :]), take(_repeat(qh[..., a, :], 4)) * to_top
        low = (word & _LOW_NIBBLES) | ((bits & np.uint32(0x40404040)) >> 2)
        high = ((word >> 4) & _LOW_NIBBLES) | ((bits & np.uint32(0x80808080)) >> 3)
        return low, high

    return _scaled_pairs(x, w, take, halves)


def _scaled_pairs(
    x: jax.Array, w: PackedTensor, take: Take, halves: Callable[[int], tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """Q4_K and Q5_K: ``halves(a)`` gives words of quants a*4.. of a group's first and second 32 weights."""
    x = x.reshape(x.shape[0], -1, 2, 32)
    low_sum, high_sum = [], []
    for a in range(8):
        low, high = halves(a)
        for b in range(4):
            low_sum.append(_byte(low, b) * _x_term(x, 0, 4 * a + b))
            high_sum.append(_byte(high, b) * _x_term(x, 1, 4 * a + b))
    low_scale, high_scale = _pair_of_scales(w.arrays["scales"], take)
    low_min, high_min = _pair_of_scales(w.arrays["mins"], take)
    x_sums = x.sum(axis=-1)
    scaled = low_scale * _add(low_sum) + high_scale * _add(high_sum)
    shifted = low_min * _x_term(x_sums, 0) + high_min * _x_term(x_sums, 1)
    d, dmin = (take(_repeat(w.arrays[name], 4)).astype(_F32) for name in ("d", "dmin"))
    return d * scaled - dmin * shifted


def _q6_k(x: jax.Array, w: PackedTensor, take: Take) -> jax.Array:
    # 128 weights: four sets of 32. Two words of low nibbles and one of high bits hold the
    # same four columns of all sets. A group is half of every set: 4 x 16 weights, one scale a set.
    ql = _words(w.arrays["ql"], 2, 2, 4)
    qh = _words(w.arrays["qh"], 2, 4)
    x = x.reshape(x.shape[0], -1, 4, 2, 16).swapaxes(2, 3).reshape(x.shape[0], -1, 4, 16)
    sums: list[list[jax.Array]] = [[], [], [], []]
    for a in range(4):
        first, second = (take(_merge_halves(ql[..., i, :, a, :])) for i in range(2))
        # Taken twice, by two expressions of one slice: XLA fuses a gather only while it has at
        # most 15 uses, and would else write the gathered bits to memory.
        bits, same_bits = take(_merge_halves(qh[..., a, :])), take(w.arrays["qh"][..., a::4, :])
        quants = (
            (first & _LOW_NIBBLES) | ((bits & _TWO_BITS) << 4),
            (second & _LOW_NIBBLES) | ((bits & (_TWO_BITS << 2)) << 2),
            ((first >> 4) & _LOW_NIBBLES) | (same_bits & (_TWO_BITS << 4)),
            ((second >> 4) & _LOW_NIBBLES) | ((same_bits >> 2) & (_TWO_BITS << 4)),
        )
        for s, words in enumerate(quants):
            sums[s].extend((_byte(words, b) - 32) * _x_term(x, s, 4 * a + b) for b in range(4))
    scales = _words(w.arrays["scales"], 2)
    total = None
    for s in range(4):
        # scale 2s + half of the 128 weights' eight
        word = take(_repeat(scales[..., s // 2, :], 2))
        to_top = _shifts([24 - 8 * (2 * s % 4 + half) for half in range(2)], word.shape[-2])
        term = _top_signed_byte(word, to_top) * _add(sums[s])
        total = term if total is None else total + term
    assert total is not None
    return take(_repeat(w.arrays["d"], 4)).astype(_F32) * total


def _merge_halves(array: jax.Array) -> jax.Array:
    """[..., groups, 2, 16] -> [..., groups * 2, 16]."""
    return array.reshape(*array.shape[:-3], -1, LANES)


def _q8_0(x: jax.Array, w: PackedTensor, take: Take) -> jax.Array:
    q = _words(w.arrays["q"], 8)
    x = x.reshape(x.shape[0], -1, 32)
    terms = []
    for a in range(8):
        word = take(q[..., a, :])
        terms.extend(
            _top_signed_byte(word, np.uint32(1 << (24 - 8 * b))) * _x_term(x, 4 * a + b) for b in range(4)
        )
    return take(w.arrays["d"]).astype(_F32) * _add(terms)


_GROUPS = {GGMLType.Q4_K: _q4_k, GGMLType.Q5_K: _q5_k, GGMLType.Q6_K: _q6_k, GGMLType.Q8_0: _q8_0}


# Whole matrices in float, for products with many tokens


def dequantize_columns(w: PackedTensor, dtype: DTypeLike) -> jax.Array:
    """Dense weights transposed, ``[..., K, N]``: the order that the layout gives without a shuffle.

    Each weight is computed in float32 and rounded to ``dtype``; float32 is bit for bit
    ``dequantize.dequantize``.
    """
    # The barrier keeps the last two axes apart while the loops are made: they divide nothing then.
    weights = lax.optimization_barrier(_WEIGHTS[w.type](w).astype(dtype))  # [..., columns, tiles, 16]
    return weights.reshape(*w.shape[:-2], w.shape[-1], w.shape[-2])


def _fields(words: jax.Array, starts: np.ndarray, bits: int) -> jax.Array:
    """Fields of ``bits`` bits at bit ``starts``, by multiplication for the reason that ``_shifts`` gives."""
    to_top = np.uint32(1) << (32 - bits - starts).astype(np.uint32)
    return (words * to_top) >> (32 - bits)


def _bytes(words: jax.Array) -> jax.Array:
    """uint32 [..., n, 16] -> uint32 [..., n * 4, 16] of single bytes, in order."""
    spread = _fields(words[..., None, :], 8 * np.arange(4)[:, None], 8)
    return spread.reshape(*words.shape[:-2], -1, LANES)


def _float(integers: jax.Array) -> jax.Array:
    return integers.astype(jnp.int32).astype(_F32)


def _signed(unsigned_bytes: jax.Array) -> jax.Array:
    return ((unsigned_bytes << 24).astype(jnp.int32) >> 24).astype(_F32)


def _columns_first(weights: jax.Array, matrix_axes: int) -> jax.Array:
    """[..., tiles, *columns, 16] -> [..., *columns, tiles, 16], columns in ``matrix_axes - 2`` axes."""
    return jnp.moveaxis(weights, -matrix_axes, -2)


def _scales(w: PackedTensor, sub: jax.Array, whole: str) -> jax.Array:
    """float32 [..., tiles, scales, 16] of sub-scales times the superblock's, computed once."""
    repeats = sub.shape[-2] // w.arrays[whole].shape[-2]
    return lax.optimization_barrier(sub * _repeat(w.arrays[whole].astype(_F32), repeats))


def _scaled(w: PackedTensor, quants: jax.Array) -> jax.Array:
    """Q4_K and Q5_K: quants [..., tiles, groups, 2, 8, 4, 16] to weights."""

    def scale(sub: str, whole: str) -> jax.Array:
        return _words(_scales(w, _float(_bytes(w.arrays[sub])), whole), 2, 1, 1)

    return _columns_first(_float(quants) * scale("scales", "d") - scale("mins", "dmin"), 6)


def _nibbles(words: jax.Array, group: int) -> jax.Array:
    """Words in groups of ``group`` -> nibbles [..., groups, 2, group, 4, 16], low halves first."""
    starts = 4 * np.arange(2)[:, None, None, None] + 8 * np.arange(4)[:, None]
    return _fields(_words(words, 1, group, 1), starts, 4)


def _weights_q4_k(w: PackedTensor) -> jax.Array:
    return _scaled(w, _nibbles(w.arrays["q"], 8))


def _weights_q5_k(w: PackedTensor) -> jax.Array:
    low = _nibbles(w.arrays["q"], 8)
    # [..., superblocks, 4 quarters, 2 halves, 8 words, 4 bytes, 16]
    starts = 2 * np.arange(4)[:, None, None, None, None] + np.arange(2)[:, None, None, None]
    bits = _fields(_words(w.arrays["qh"], 1, 1, 8, 1), starts + 8 * np.arange(4)[:, None], 1)
    return _scaled(w, low | (bits.reshape(low.shape) << 4))


def _weights_q6_k(w: PackedTensor) -> jax.Array:
    # Axes of 128 weights: 2 (nibble), 2 (half of the low words), 2 (scale), 4 words, 4 bytes.
    starts = 4 * np.arange(2)[:, None, None, None, None, None] + 8 * np.arange(4)[:, None]
    low = _fields(_words(w.arrays["ql"], 1, 2, 2, 4, 1), starts, 4)
    starts = np.array([[0, 2], [4, 6]])[:, :, None, None, None, None] + 8 * np.arange(4)[:, None]
    bits = _fields(_words(w.arrays["qh"], 1, 1, 2, 4, 1), starts, 2)
    scales = _words(_scales(w, _signed(_bytes(w.arrays["scales"])), "d"), 2, 2, 2, 1, 1)
    return _columns_first((_float(low | (bits << 4)) - 32) * scales, 8)


def _weights_q8_0(w: PackedTensor) -> jax.Array:
    to_top = (np.uint32(1) << (24 - 8 * np.arange(4)).astype(np.uint32))[:, None]
    quants = _top_signed_byte(_words(w.arrays["q"], 8, 1), to_top)
    return _columns_first(quants * _words(w.arrays["d"].astype(_F32), 1, 1), 5)


_WEIGHTS = {
    GGMLType.Q4_K: _weights_q4_k,
    GGMLType.Q5_K: _weights_q5_k,
    GGMLType.Q6_K: _weights_q6_k,
    GGMLType.Q8_0: _weights_q8_0,
}
