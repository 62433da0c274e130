"""attention in plain jnp: blocks of keys up to the last one needed, with a running softmax.

Work follows the used part of the cache, not its size, and no [T, S] matrix is
ever built: queries go in tiles, keys in blocks
(the recurrence of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

QUERY_TILE = 256
KEY_BLOCK = 256


@jax.jit
def attention(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, positions: jax.Array, layer: jax.Array
) -> jax.Array:
    """See ``api.attention``; the caches are those of all layers."""
    return _attention(q, k_cache, v_cache, positions, layer)


@jax.custom_vjp
def _attention(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, positions: jax.Array, layer: jax.Array
) -> jax.Array:
    T = q.shape[1]
    if T <= QUERY_TILE:
        return _query_tile(q, k_cache, v_cache, positions, layer)
    tiles = -(-T // QUERY_TILE)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * QUERY_TILE, T - QUERY_TILE)  # the last tile may overlap
        part = _query_tile(
            lax.dynamic_slice_in_dim(q, start, QUERY_TILE, axis=1),
            k_cache,
            v_cache,
            lax.dynamic_slice_in_dim(positions, start, QUERY_TILE, axis=1),
            layer,
        )
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, tiles, step, jnp.zeros(q.shape, jnp.float32))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, K, G, H] and k [B, S, K, H] -> float32 [B, K, G, T, S]."""
    return _einsum("btkgh,bskh->bkgts", q, k) * (q.shape[-1] ** -0.5)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _query_tile(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, positions: jax.Array, layer: jax.Array
) -> jax.Array:
    B, T, N, H = q.shape
    S, K = k_cache.shape[2:4]
    block = min(KEY_BLOCK, S)
    grouped = q.reshape(B, T, K, N // K, H)

    def step(i: jax.Array, state: tuple) -> tuple:
        peak, total, out = state
        start = jnp.minimum(i * block, S - block)
        slots = start + jnp.arange(block)
        corner, size = (layer, 0, start, 0, 0), (1, B, block, K, H)
        k, v = (lax.dynamic_slice(cache, corner, size)[0] for cache in (k_cache, v_cache))
        # slots below i * block were seen by the step before, when the last block overlaps
        visible = (slots <= positions[..., None]) & (slots >= i * block)
        scores = jnp.where(visible[:, None, None], _scores(grouped, k), -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        safe_peak = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        weights = jnp.exp(scores - safe_peak[..., None])
        shrink = jnp.exp(peak - safe_peak)
        out = out * shrink[..., None] + _einsum("bkgts,bskh->bkgth", weights, v)
        return new_peak, total * shrink + weights.sum(axis=-1), out

    shape = (B, K, N // K, T)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, H)))
    used = jnp.clip(jnp.max(positions) + 1, 0, S)
    _, total, out = lax.fori_loop(0, (used + block - 1) // block, step, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(q.shape)


def _plain(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, positions: jax.Array, layer: jax.Array
) -> jax.Array:
    """The same in one piece, which autodiff can reverse."""
    B, T, N, H = q.shape
    S, K = k_cache.shape[2:4]
    k, v = (lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (k_cache, v_cache))
    scores = _scores(q.reshape(B, T, K, N // K, H), k)
    visible = (jnp.arange(S) <= positions[..., None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1, where=visible)
    return _einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _forward(q, k_cache, v_cache, positions, layer) -> tuple:
    return _attention(q, k_cache, v_cache, positions, layer), (q, k_cache, v_cache, positions, layer)


def _backward(residuals: tuple, dy: jax.Array) -> tuple:
    q, k_cache, v_cache, positions, layer = residuals
    plain = partial(_plain, positions=positions, layer=layer)
    return *jax.vjp(plain, q, k_cache, v_cache)[1](dy), None, None


_attention.defvjp(_forward, _backward)
