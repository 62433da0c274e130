"""Rows of a batch's cache: copied, cut out and put back, so that a prompt need not be read twice."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from qwen3_moe_jax.jax_backend.generate import DecodeState
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.programs import Program

MIN_POSITIONS = 128
"""Lengths are powers of two from this on, so that few programs are compiled."""


def padded(cache: KVCache, length: int) -> int:
    """The length of the piece that holds ``length`` positions."""
    return min(max(MIN_POSITIONS, 1 << (length - 1).bit_length()), cache.length)


def nbytes(cache: KVCache, length: int) -> int:
    """Bytes of the piece that holds ``length`` positions of one row."""
    rows, positions = cache.k.shape[1:3]
    return sum(x.nbytes for x in jax.tree.leaves(cache)) // (rows * positions) * padded(cache, length)


@partial(Program, static_argnames=("length",))
def cut(cache: KVCache, row: jax.Array, *, length: int) -> KVCache:
    """The first ``length`` positions of a row, int32 scalar: a cache of one row."""

    def piece(stack: jax.Array) -> jax.Array:
        sizes = (stack.shape[0], 1, length, *stack.shape[3:])
        return jax.lax.dynamic_slice(stack, (0, row, *(0 for _ in sizes[2:])), sizes)

    return jax.tree.map(piece, cache)


@partial(Program, donate_argnames=("state",))
def paste(state: DecodeState, row: jax.Array, piece: KVCache) -> DecodeState:
    """Puts a cache of one row at the beginning of a row, int32 scalar."""

    def put(stack: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(stack, new, (0, row, *(0 for _ in stack.shape[2:])))

    return replace(state, cache=jax.tree.map(put, state.cache, piece))


@partial(Program, static_argnames=("length",), donate_argnames=("state",))
def copy(state: DecodeState, source: jax.Array, target: jax.Array, *, length: int) -> DecodeState:
    """Copies the first ``length`` positions of one row to another; both int32 scalars."""
    return paste(state, target, cut(state.cache, source, length=length))


@partial(Program, donate_argnames=("state",))
def allow(state: DecodeState, slot: jax.Array, bits: jax.Array) -> DecodeState:
    """Lets a masked sequence write one token; ``bits`` int32 [ceil(V / 32)]."""
    return replace(
        state, allowed=state.allowed.at[slot].set(bits), held=state.held.at[slot].set(jnp.bool_(False))
    )
