"""Register layouts of the decode kernel: which lane holds what.

A weight tile is 8 rows x 256 columns. One warp reads a tile with each lane holding one row (of 8) and 64
neighbouring columns (of 4 groups), so a 16-byte vector per lane is 512 contiguous bytes per warp. A warpgroup
reads four tiles: four superblocks of the same rows, or the same superblock of 32 rows.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_TILED = plgpu.Layout.TILED

TILE_WORDS = _TILED(plgpu.Tiling(((4, 8, 4, 4),)), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
"""int32 [4 tiles, 8 rows, 4 column groups, 4 words]."""
TILE_LANES = TILE_WORDS.reduce(3)
"""[4 tiles, 8 rows, 4 column groups]: one value per lane."""
TILE_ROWS = TILE_WORDS.reduce((2, 3))
"""[4 tiles, 8 rows]."""
SUBBLOCKS = _TILED(
    plgpu.Tiling(((32, 1, 4, 4), (8, 1, 4, 4))), warp_dims=(-8,), lane_dims=(-4, -2), vector_dim=-1
)
"""float32 [32 subblocks, 2 halves, 4 words, 4 bytes]: 1,024 activations, 8 per lane."""
OUTPUT_ROWS = _TILED(plgpu.Tiling(((16, 8, 1), (4, 8, 1))), (-6,), (-3, -2), -1).reduce(2)
"""float32 [16 tiles, 8 rows]: one result per lane."""

EXPERTS = _TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
"""float32 [4 sequences, 128 n experts]: one sequence per warp."""

SCALAR = plgpu.Layout.WG_SPLAT(())

WARPGROUP = 128
"""Threads of a warpgroup."""
CHUNK = 64
"""Tokens of attention that a warpgroup takes at a time: 16 per warp."""
RANKED = 128
"""Experts that ``rank_experts`` ranks."""
RANK_WORDS = RANKED + 4
"""Words of its scratch per warpgroup: the second half lies in other banks than the first."""
LOG2E = 1.4426950408889634


def head_halves(head_dim: int):
    """The layout of float32 [8 heads, half of the dimensions]; ``head_dim`` is 64 or 128."""
    tiling = plgpu.Tiling(((8, head_dim // 2), (2, head_dim // 32)))
    return _TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def lanes(n: int):
    """The layout of a vector of ``n`` values, one per lane and ``n / 128`` registers."""
    return plgpu.Layout.WG_STRIDED((n,), 1)


def load(ref: Any, layout: Any) -> Any:
    """The array of a reference in registers of ``layout``."""
    return plgpu.load(ref, layout=layout, optimized=False)


def full(shape, value, dtype, layout):
    """A constant array of a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def sum_groups(value):
    """[4, 8] of layout ``TILE_ROWS``: the sum of each row's four column groups, of [4, 8, 4]."""
    return plgpu.layout_cast(jnp.sum(value, axis=2), TILE_ROWS)
