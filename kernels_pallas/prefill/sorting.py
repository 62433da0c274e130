"""Tokens sorted by expert on the device, in a few small dense steps and without a sort.

Each expert's rows begin at a multiple of ``ROW_ALIGN`` in one array, so that no two experts
share a unit of the matrix kernel's stores. The matrix kernel walks over tiles: at most
``tile`` rows of one expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ROW_ALIGN = 8
_BLOCK = 128


class Tiles(NamedTuple):
    """The tiles of rows that the matrix kernel walks over.

    Attributes:
      expert: int32 [tiles], the matrix of each tile.
      start: int32 [tiles], its first row, a multiple of ``ROW_ALIGN``.
      rows: int32 [tiles], rows that it holds, rounded up to ``ROW_ALIGN``.
      count: int32 [1], tiles in use; they come first.
    """

    expert: jax.Array
    start: jax.Array
    rows: jax.Array
    count: jax.Array


class SortedRows(NamedTuple):
    """Where (token, choice) pairs lie after sorting.

    Attributes:
      place: int32 [T, X], the row of each pair.
      source: int32 [rows], the pair t * X + x of each row; 0 for rows that hold none.
      tiles: the tiles of these rows.
    """

    place: jax.Array
    source: jax.Array
    tiles: Tiles


def dense_tiles(rows: int, tile: int) -> Tiles:
    """The tiles of one matrix and ``rows`` rows."""
    count = -(-rows // tile)
    start = jnp.arange(count, dtype=jnp.int32) * tile
    aligned = -(-rows // ROW_ALIGN) * ROW_ALIGN
    return Tiles(
        jnp.zeros(count, jnp.int32), start, jnp.minimum(aligned - start, tile), jnp.full(1, count, jnp.int32)
    )


def padded_rows(pairs: int, experts: int, tile: int) -> int:
    """Rows that hold ``pairs`` pairs sorted by expert, and a whole tile after any of them."""
    used = pairs + min(pairs, experts) * (ROW_ALIGN - 1)
    return -(-(used + tile) // ROW_ALIGN) * ROW_ALIGN


def _prefix_sums(counts: jax.Array) -> jax.Array:
    """Sums over earlier rows of counts [T, E] of small integers: float32 [T, E], exact up to 2^24."""
    tokens, experts = counts.shape
    blocks = -(-tokens // _BLOCK)
    counts = jnp.pad(counts, ((0, blocks * _BLOCK - tokens), (0, 0))).reshape(blocks, _BLOCK, experts)
    before = jnp.tri(_BLOCK, k=-1, dtype=jnp.bfloat16)
    # Small integers are exact in bfloat16 and their sums in float32.
    inside = jnp.einsum(
        "ij,bje->bie", before, counts.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    whole = jnp.sum(counts.astype(jnp.float32), axis=1)
    earlier = jnp.cumsum(whole, axis=0) - whole
    return (inside + earlier[:, None]).reshape(blocks * _BLOCK, experts)[:tokens]


def sort_by_expert(expert_ids: jax.Array, experts: int, tile: int) -> SortedRows:
    """Sorts pairs by expert, in the order of tokens within an expert.

    Args:
      expert_ids: int32 [T, X], each in [0, experts).
      experts: E.
      tile: rows a tile.
    """
    tokens, choices = expert_ids.shape
    pairs = tokens * choices
    one_hot = (expert_ids[:, :, None] == jnp.arange(experts)).astype(jnp.int32)
    counts = one_hot.sum(axis=1)
    earlier = _prefix_sums(counts).astype(jnp.int32)
    same = expert_ids[:, :, None] == expert_ids[:, None, :]
    repeats = jnp.sum(same & jnp.tri(choices, k=-1, dtype=bool), axis=2)  # forced ids may repeat
    total = counts.sum(axis=0)
    aligned = -(-total // ROW_ALIGN) * ROW_ALIGN
    starts = jnp.cumsum(aligned) - aligned
    place = jnp.take_along_axis(earlier + starts, expert_ids, axis=1) + repeats
    rows = padded_rows(pairs, experts, tile)
    order = jnp.arange(pairs, dtype=jnp.int32)
    source = jnp.zeros(rows, jnp.int32).at[place.reshape(-1)].set(order, unique_indices=True, mode="drop")

    tiles_each = -(-aligned // tile)
    ends = jnp.cumsum(tiles_each)
    limit = min(pairs, pairs // tile + experts)
    index = jnp.arange(limit, dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    within = (index - (ends - tiles_each)[expert]) * tile
    count = lax.slice_in_dim(ends, experts - 1, experts).astype(jnp.int32)
    used = index < count
    start = jnp.where(used, starts[expert] + within, 0).astype(jnp.int32)
    held = jnp.where(used, jnp.minimum(aligned[expert] - within, tile), 0).astype(jnp.int32)
    return SortedRows(place.astype(jnp.int32), source, Tiles(expert, start, held, count))
