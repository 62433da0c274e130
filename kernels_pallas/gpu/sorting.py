"""Tokens sorted by expert on the device, in a few small dense operations and without a sort.

Each expert's rows begin at a multiple of ``ROW_ALIGN`` in one array, so that no two experts
share a unit of the matrix kernel's stores. The matrix kernel walks over tiles: at most
``tile`` rows of one expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROW_ALIGN = 8
_BLOCK = 128
_MAX_COMPARED = 1024
"""Up to this many pairs are all compared with each other, which takes fewer launches."""


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


class UsedExperts(NamedTuple):
    """All rows with each of these experts, in place of tiles: for few rows.

    Attributes:
      experts: int32 [E], those that multiply the rows come first.
      count: int32 [1], how many they are.
    """

    experts: jax.Array
    count: jax.Array


class SortedRows(NamedTuple):
    """Where (token, choice) pairs lie after sorting.

    Attributes:
      destination: int32 [T, X], the row of each pair; those of no expert have none, and a number beyond all.
      pair: int32 [rows], the pair t * X + x of each row; -1 for rows that hold none.
      tiles: the tiles of these rows.
    """

    destination: jax.Array
    pair: jax.Array
    tiles: Tiles

    @property
    def source(self) -> jax.Array:
        """``pair``, and 0 for rows that hold none: an index of what these are brought from."""
        return jnp.maximum(self.pair, 0)


def dense_tiles(rows: int, tile: int) -> Tiles:
    """The tiles of one matrix and ``rows`` rows, as constants."""
    count = -(-rows // tile)
    start = np.arange(count, dtype=np.int32) * tile
    aligned = -(-rows // ROW_ALIGN) * ROW_ALIGN
    held = np.minimum(aligned - start, tile).astype(np.int32)
    return Tiles(*map(jnp.asarray, (np.zeros(count, np.int32), start, held, np.full(1, count, np.int32))))


def padded_rows(pairs: int, experts: int, tile: int) -> int:
    """Rows that hold ``pairs`` pairs sorted by expert, and a whole tile after any of them."""
    used = pairs + min(pairs, experts) * (ROW_ALIGN - 1)
    return -(-(used + tile) // ROW_ALIGN) * ROW_ALIGN


def _prefix_sums(counts: jax.Array) -> jax.Array:
    """Sums over earlier rows of counts [T, E] of small integers: float32 [T, E], exact up to 2^24."""
    tokens, experts = counts.shape
    blocks = -(-tokens // _BLOCK)
    counts = jnp.pad(counts, ((0, blocks * _BLOCK - tokens), (0, 0))).reshape(blocks, _BLOCK, experts)
    before = jnp.asarray(np.tri(_BLOCK, k=-1), jnp.bfloat16)
    # Small integers are exact in bfloat16 and their sums in float32.
    inside = jnp.einsum(
        "ij,bje->bie", before, counts.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    whole = jnp.sum(counts.astype(jnp.float32), axis=1)
    earlier = jnp.cumsum(whole, axis=0) - whole
    return (inside + earlier[:, None]).reshape(blocks * _BLOCK, experts)[:tokens]


def _ranks(expert_ids: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier pairs [T, X] have the pair's expert, and pairs [E] of each expert."""
    tokens, choices = expert_ids.shape
    if expert_ids.size <= _MAX_COMPARED:
        ids = expert_ids.reshape(-1)
        earlier = (ids[:, None] == ids) & np.tri(ids.size, k=-1, dtype=bool)
        total = jnp.sum(ids[:, None] == np.arange(experts), axis=0, dtype=jnp.int32)
        return jnp.sum(earlier, axis=1, dtype=jnp.int32).reshape(tokens, choices), total
    counts = (expert_ids[:, :, None] == np.arange(experts)).astype(jnp.int32).sum(axis=1)
    earlier = _prefix_sums(counts).astype(jnp.int32)
    same = expert_ids[:, :, None] == expert_ids[:, None, :]
    repeats = jnp.sum(same & np.tri(choices, k=-1, dtype=bool), axis=2)  # forced ids may repeat
    known = jnp.minimum(expert_ids, experts - 1)
    return jnp.take_along_axis(earlier, known, axis=1) + repeats, counts.sum(axis=0)


def _sums_before(values: jax.Array) -> jax.Array:
    """Sums of earlier values [n], in one reduction."""
    return jnp.sum(jnp.where(np.tri(len(values), k=-1, dtype=bool), values, 0), axis=1)


def used_experts(expert_ids: jax.Array, experts: int) -> UsedExperts:
    """The experts that any (token, choice) pair asks for, in order."""
    used = jnp.any(expert_ids.reshape(-1) == np.arange(experts)[:, None], axis=1).astype(jnp.int32)
    here = (_sums_before(used) == np.arange(experts)[:, None]) & (used > 0)
    in_order = jnp.sum(jnp.where(here, np.arange(experts), 0), axis=1, dtype=jnp.int32)
    return UsedExperts(in_order, jnp.sum(used, dtype=jnp.int32).reshape(1))


def sort_by_expert(expert_ids: jax.Array, experts: int, tile: int) -> SortedRows:
    """Sorts pairs by expert, in the order of tokens within an expert.

    Args:
      expert_ids: int32 [T, X], each in [0, experts), or ``experts`` for a pair that gets no row.
      experts: E.
      tile: rows per tile.
    """
    pairs = expert_ids.size
    ranks, total = _ranks(expert_ids, experts)
    aligned = -(-total // ROW_ALIGN) * ROW_ALIGN
    starts = _sums_before(aligned)
    rows = padded_rows(pairs, experts, tile)
    order = np.arange(pairs, dtype=np.int32)
    nowhere = rows + order.reshape(expert_ids.shape)
    row = starts[jnp.minimum(expert_ids, experts - 1)] + ranks
    destination = jnp.where(expert_ids < experts, row, nowhere).astype(jnp.int32)
    if pairs <= _MAX_COMPARED:
        here = destination.reshape(-1) == np.arange(rows)[:, None]
        pair = jnp.max(jnp.where(here, order, -1), axis=1)
    else:
        pair = (
            jnp.full(rows, -1, jnp.int32)
            .at[destination.reshape(-1)]
            .set(order, unique_indices=True, mode="drop")
        )

    tiles_each = -(-aligned // tile)
    before = _sums_before(tiles_each)
    limit = min(pairs, pairs // tile + experts)
    index = np.arange(limit, dtype=np.int32)
    expert = jnp.sum(index[:, None] >= before + tiles_each, axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    within = (index - before[expert]) * tile
    count = jnp.sum(tiles_each, dtype=jnp.int32).reshape(1)
    used = index < count
    start = jnp.where(used, starts[expert] + within, 0).astype(jnp.int32)
    held = jnp.where(used, jnp.minimum(aligned[expert] - within, tile), 0).astype(jnp.int32)
    return SortedRows(destination, pair, Tiles(expert, start, held, count))
