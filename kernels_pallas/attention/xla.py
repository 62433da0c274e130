"""attention in plain jnp: blocks of keys up to the last one needed, with a running softmax.

Work follows the used part of the cache, not its size, and no [T, S] matrix is
ever built: queries go in tiles, keys in blocks
(the recurrence of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

QUERY_TILE = 256
KEY_BLOCK = 256


Scales = tuple[jax.Array, jax.Array] | None


@jax.jit
def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    slots: jax.Array | None = None,
    scales: Scales = None,
) -> jax.Array:
    """See ``api.attention``; the caches are those of all layers."""
    if scales is None:
        return _differentiable(q, k_cache, v_cache, positions, layer, slots)
    return _attention(q, k_cache, v_cache, positions, layer, slots, scales)


def _attention(q, k_cache, v_cache, positions, layer, slots, scales) -> jax.Array:
    T = q.shape[1]
    if T <= QUERY_TILE:
        return _query_tile(q, k_cache, v_cache, positions, layer, slots, scales)
    tiles = -(-T // QUERY_TILE)

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * QUERY_TILE, T - QUERY_TILE)  # the last tile may overlap
        part = _query_tile(
            lax.dynamic_slice_in_dim(q, start, QUERY_TILE, axis=1),
            k_cache,
            v_cache,
            lax.dynamic_slice_in_dim(positions, start, QUERY_TILE, axis=1),
            layer,
            slots,
            scales,
        )
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, tiles, one_tile, jnp.zeros(q.shape, jnp.float32))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, K, G, H] and k [B, S, K, H] -> float32 [B, K, G, T, S]."""
    return _einsum("btkgh,bskh->bkgts", q, k) * (q.shape[-1] ** -0.5)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _read(cache: jax.Array, layer: jax.Array, slots: jax.Array | int, start: jax.Array, block: int):
    """Positions start to start + block - 1 of one layer: [B, block, ...].

    ``slots``: the rows int32 [B] of the cache, or B for its first ones. Nothing else is copied.
    """
    inner = cache.shape[3:]

    def rows(first: jax.Array | int, count: int) -> jax.Array:
        corner = (layer, first, start, *(0 for _ in inner))
        return lax.dynamic_slice(cache, corner, (1, count, block, *inner))[0]

    read = rows(0, slots) if isinstance(slots, int) else jnp.concatenate([rows(slot, 1) for slot in slots])
    return lax.platform_dependent(read, cpu=lambda block: block, default=_in_its_own_layout)


def _in_its_own_layout(block: jax.Array) -> jax.Array:
    """Without this XLA gives a GPU's whole cache the layout that suits the product: a copy each call."""
    return with_layout_constraint(block, Layout(tuple(range(block.ndim))))


def _query_tile(q, k_cache, v_cache, positions, layer, slots, scales) -> jax.Array:
    B, T, N, H = q.shape
    S, K = k_cache.shape[2:4]
    block = min(KEY_BLOCK, S)
    grouped = q.reshape(B, T, K, N // K, H)
    slots = B if slots is None else slots

    def one_block(i: jax.Array, state: tuple) -> tuple:
        peak, total, out = state
        start = jnp.minimum(i * block, S - block)
        key_positions = start + jnp.arange(block)
        k, v = (_read(cache, layer, slots, start, block) for cache in (k_cache, v_cache))
        # key_positions below i * block were seen by the iteration before, when the last block overlaps
        visible = (key_positions <= positions[..., None]) & (key_positions >= i * block)
        scores = _scores(grouped, k)
        if scales is not None:  # [B, block, K], of keys and of values
            k_scale, v_scale = (
                jnp.moveaxis(_read(scale, layer, slots, start, block), 1, 2)[:, :, None, None]
                for scale in scales
            )
            scores = scores * k_scale
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        safe_peak = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        weights = jnp.exp(scores - safe_peak[..., None])
        shrink = jnp.exp(peak - safe_peak)
        scaled = weights if scales is None else weights * v_scale
        out = out * shrink[..., None] + _einsum("bkgts,bskh->bkgth", scaled, v)
        return new_peak, total * shrink + weights.sum(axis=-1), out

    shape = (B, K, N // K, T)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, H)))
    used = jnp.clip(jnp.max(positions) + 1, 0, S)
    _, total, out = lax.fori_loop(0, (used + block - 1) // block, one_block, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(q.shape)


@jax.custom_vjp
def _differentiable(q, k_cache, v_cache, positions, layer, slots) -> jax.Array:
    return _attention(q, k_cache, v_cache, positions, layer, slots, None)


def _plain(q, k_cache, v_cache, positions, layer, slots) -> jax.Array:
    """The same in one piece, which autodiff can reverse."""
    B, T, N, H = q.shape
    S, K = k_cache.shape[2:4]
    k, v = (lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (k_cache, v_cache))
    k, v = (cache[:B] if slots is None else cache[slots] for cache in (k, v))
    scores = _scores(q.reshape(B, T, K, N // K, H), k)
    visible = (jnp.arange(S) <= positions[..., None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1, where=visible)
    return _einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _forward(*args) -> tuple:
    return _differentiable(*args), args


def _backward(residuals: tuple, dy: jax.Array) -> tuple:
    q, k_cache, v_cache, positions, layer, slots = residuals
    plain = partial(_plain, positions=positions, layer=layer, slots=slots)
    return *jax.vjp(plain, q, k_cache, v_cache)[1](dy), None, None, None


_differentiable.defvjp(_forward, _backward)
