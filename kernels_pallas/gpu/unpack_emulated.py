"""The operands of ``unpack_sm90`` in jnp, with the same roundings, for Pallas' interpreter on a CPU."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu.activations import WEIGHT_SCALE
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import (
    CENTERS,
    EXPONENT,
    MAX_EXPONENT,
    NIBBLE_OF_HALF,
    PIECE,
    SLAB_ROWS,
    TABLES,
    TILE_ARRAYS,
    TWO_BITS,
    WarpTiles,
)


def emulated_operand(type: GGMLType, refs: dict, tiles: WarpTiles, quarter: int, group):
    subblock, half = divmod(quarter, 2)
    tile = lax.iota(jnp.int32, 8)  # in the order of rows: warp, half
    index = tiles.base + group * tiles.by_group + tile // 2 * tiles.by_warp + tile % 2 * tiles.by_half
    arrays = {}
    for name, array in TILE_ARRAYS[type].items():
        whole = refs[name][...]
        arrays[name] = whole.reshape(-1, array.parts * array.inner)[index]  # [8 tiles, elements]
    f16, f32 = jnp.float16, jnp.float32
    byte = lambda words, i: (words >> (8 * i)) & 0xFF

    def row(name: str):
        """float16 [8, 8 rows, 1 group]."""
        return arrays[name].astype(f16)[:, :, None]

    def lane(name: str):
        """[8, 8 rows, 4 groups]."""
        return arrays[name].reshape(8, 8, 4)

    def word_bytes(name: str, vector: int):
        """int32 [8, 8 rows, 4 groups, 4 words, 4 bytes]."""
        words = arrays[name].reshape(8, -1, 8, 4, 4)[:, vector]
        return jnp.stack([byte(words, i) for i in range(4)], axis=-1)

    def signed(value):
        return jnp.where(value > 127, value - 256, value)

    def quants():
        if type is GGMLType.Q8_0:
            return signed(word_bytes("q", quarter))
        if type in TABLES:
            words = arrays["q"].reshape(8, 2, 8, 4, 2, 2)[:, subblock, :, :, half]
            nibbles = words[..., None] >> (4 * jnp.arange(8)) & 15
            values: Any = sum(jnp.where(nibbles == i, v, 0) for i, v in enumerate(TABLES[type]))
            return values.reshape(8, 8, 4, 4, 4)
        if type in TWO_BITS:
            q, width = word_bytes("q", 0) >> (2 * (2 * half + subblock)) & 3, 2
        else:
            of_half = type in NIBBLE_OF_HALF
            vector, nibble = (subblock, half) if of_half else (half, subblock)
            q, width = word_bytes("ql" if type is GGMLType.Q6_K else "q", vector) >> (4 * nibble) & 15, 4
        if type is GGMLType.Q6_K:
            q = q | (word_bytes("qh", 0) >> (2 * (2 * half + subblock)) & 3) << 4
        elif "qh" in arrays:
            word = arrays["qh"].reshape(8, 2, 8, 4)[:, half]
            bits = jnp.stack([byte(word, i) for i in range(4)], axis=-1)[:, :, :, None]
            q = q | (bits >> (jnp.arange(4)[:, None] + 4 * subblock) & 1) << width
        return q - CENTERS.get(type, 0)

    def scale_and_minimum() -> tuple:
        if "e" in arrays:
            e = jnp.minimum(byte(lane("e").astype(jnp.int32), subblock), MAX_EXPONENT)
            return lax.bitcast_convert_type((e + EXPONENT) << 23, f32).astype(f16), None
        if "d0" in arrays:
            minimum = -lane(f"m{subblock}") * f16(WEIGHT_SCALE) if "m0" in arrays else None
            return lane(f"d{subblock}") * f16(WEIGHT_SCALE), minimum
        whole, scales = row("d") * f16(WEIGHT_SCALE), lane("scales").astype(jnp.int32)
        if "dmin" not in arrays:
            number = subblock if type is GGMLType.IQ4_XS else 2 * subblock + half
            return signed(byte(scales, number)).astype(f16) * whole, None
        if type is GGMLType.Q2_K:
            both = byte(scales, 2 * subblock + half)
            scale, minimum = both & 15, both >> 4
        else:
            scale, minimum = byte(scales, subblock), byte(scales, 2 + subblock)
        return scale.astype(f16) * whole, minimum.astype(f16) * (row("dmin") * f16(WEIGHT_SCALE))

    scale, minimum = scale_and_minimum()
    w = quants().astype(f32) * scale.astype(f32)[..., None, None]
    if minimum is not None:
        w = w - minimum.astype(f32)[..., None, None]
    w = w.astype(f16).reshape(8, 8, 4, 4, 2, 2)  # tile, row, group, word, b, c
    return w.transpose(0, 1, 3, 5, 2, 4).reshape(SLAB_ROWS, PIECE)
