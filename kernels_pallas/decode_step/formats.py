"""Which class reads a type's weights in the decode kernel."""

from typing import Any

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.decode_step import small_formats, tile_formats
from qwen3_moe_jax.kernels_pallas.decode_step.row_formats import ROW_FORMATS

TILE_FORMATS: dict[GGMLType, Any] = {
    GGMLType.Q4_0: small_formats.TiledQ40,
    GGMLType.Q4_1: small_formats.TiledQ41,
    GGMLType.Q5_0: small_formats.TiledQ50,
    GGMLType.Q5_1: small_formats.TiledQ51,
    GGMLType.Q8_0: tile_formats.Q80,
    GGMLType.Q2_K: small_formats.TiledQ2K,
    GGMLType.Q3_K: small_formats.TiledQ3K,
    GGMLType.Q4_K: tile_formats.Q4K,
    GGMLType.Q5_K: tile_formats.Q5K,
    GGMLType.Q6_K: tile_formats.Q6K,
    GGMLType.IQ4_NL: small_formats.TiledIQ4NL,
    GGMLType.IQ4_XS: small_formats.TiledIQ4XS,
    GGMLType.MXFP4: small_formats.TiledMXFP4,
}


def format_of(type: GGMLType, tiled: bool = True) -> Any:
    """How weights of a type are read.

    Args:
      tiled: whether those lie in tiles whose type tiles hold.
    """
    return TILE_FORMATS[type] if tiled and type in TILE_FORMATS else ROW_FORMATS[type]
