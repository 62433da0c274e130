"""What a tile of packed weights is in shared memory, and what its bits mean, for the grouped product."""

from dataclasses import dataclass

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.convert.ggml_types import GGMLType

SLAB_ROWS = 64
"""Rows of one wgmma operand: eight tiles, two per warp."""
PIECE = 64
"""Columns of one operand, and of one piece of x: a quarter of a superblock, four wgmma instructions."""
PIECES = 4
LANES = 32


@dataclass(frozen=True)
class TileArray:
    """One array of a tile in shared memory: ``parts`` x ``inner`` elements of ``dtype``."""

    dtype: str
    parts: int
    inner: int


def _pair(name: str) -> dict[str, TileArray]:
    """A float16 of each subblock of a lane."""
    return {f"{name}{s}": TileArray("float16", 1, 32) for s in range(2)}


_SCALED = {"scales": TileArray("int32", 1, 32), "d": TileArray("float16", 1, 8)}
TILE_ARRAYS: dict[GGMLType, dict[str, TileArray]] = {
    GGMLType.Q4_K: {"q": TileArray("int32", 1, 256), **_SCALED, "dmin": TileArray("float16", 1, 8)},
    GGMLType.Q5_K: {
        "q": TileArray("int32", 1, 256),
        "qh": TileArray("int32", 1, 64),
        **_SCALED,
        "dmin": TileArray("float16", 1, 8),
    },
    GGMLType.Q6_K: {"ql": TileArray("int32", 1, 256), "qh": TileArray("int32", 1, 128), **_SCALED},
    GGMLType.Q8_0: {"q": TileArray("int32", 2, 256), **_pair("d")},
    GGMLType.Q2_K: {"q": TileArray("int32", 1, 128), **_SCALED, "dmin": TileArray("float16", 1, 8)},
    GGMLType.Q3_K: {"q": TileArray("int32", 1, 128), "qh": TileArray("int32", 1, 64), **_SCALED},
    GGMLType.Q4_0: {"q": TileArray("int32", 1, 256), **_pair("d")},
    GGMLType.Q4_1: {"q": TileArray("int32", 1, 256), **_pair("d"), **_pair("m")},
    GGMLType.Q5_0: {"q": TileArray("int32", 1, 256), "qh": TileArray("int32", 1, 64), **_pair("d")},
    GGMLType.Q5_1: {
        "q": TileArray("int32", 1, 256),
        "qh": TileArray("int32", 1, 64),
        **_pair("d"),
        **_pair("m"),
    },
    GGMLType.IQ4_NL: {"q": TileArray("int32", 1, 256), **_pair("d")},
    GGMLType.IQ4_XS: {
        "q": TileArray("int32", 1, 256),
        "scales": TileArray("int16", 1, 32),
        "d": TileArray("float16", 1, 8),
    },
    GGMLType.MXFP4: {"q": TileArray("int32", 1, 256), "e": TileArray("int16", 1, 32)},
}
"""Arrays of a tile by type; a copy's innermost axis has at most 256 elements."""
TWO_BITS = (GGMLType.Q2_K, GGMLType.Q3_K)
NIBBLE_OF_HALF = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1)
"""Types whose vectors are subblocks and nibbles halves, not the other way round."""
CENTERS = {GGMLType.Q3_K: 4, GGMLType.Q4_0: 8, GGMLType.Q5_0: 16, GGMLType.Q6_K: 32}
TABLES = {GGMLType.IQ4_NL: VALUES, GGMLType.IQ4_XS: VALUES, GGMLType.MXFP4: FP4_VALUES}
EXPONENT = 127 - 128 + 4
"""What is added to MXFP4's exponent for the bits of float32 2^(e - 128) * ``WEIGHT_SCALE``."""
MAX_EXPONENT = 255 - EXPONENT
"""From here on that is infinite."""


@dataclass(frozen=True)
class WarpTiles:
    """Which tiles a warp reads: tile ``base + warpgroup * by_group + warp * by_warp + half * by_half``."""

    base: int
    by_group: int
    by_warp: int
    by_half: int
