"""The GPU tile arrangement is an exact shuffle: lanes find every weight where they expect it."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack

SEED = 20260923
SHAPE = (2, 16, 512)


def random_rows(type: GGMLType, shape: tuple[int, ...], seed: int = SEED) -> PackedTensor:
    """Packed weights of random bytes with finite scales."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    block = BLOCK_FORMATS[type]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block.weights, block.nbytes), dtype=np.uint8)
    for name in ("d", "dmin"):
        if name in block.fields:
            field = block.fields[name]
            scale = rng.uniform(1e-3, 2e-3, len(blocks)).astype("<f2").view(np.uint8).reshape(-1, 2)
            blocks[:, field.offset : field.offset + 2] = scale
    return pack(blocks.reshape(-1), type, shape)


def lane_weights(tiles: PackedTensor) -> np.ndarray:
    """Float32 weights [..., tile, superblock, row, group, s, half, 16], by the documented bit positions."""
    a = {k: np.asarray(v) for k, v in tiles.arrays.items()}
    words = lambda w: np.ascontiguousarray(w).view(np.uint8).reshape(*w.shape[:-1], 16)
    out = []
    for s in range(2):
        for h in range(2):
            if tiles.type is GGMLType.Q8_0:
                w = words(a["q"][..., 2 * s + h, :, :, :]).view(np.int8).astype(np.float32)
                out.append(w * a[f"d{s}"].astype(np.float32)[..., None])
                continue
            low = words(a["ql" if tiles.type is GGMLType.Q6_K else "q"][..., h, :, :, :]) >> (4 * s) & 15
            scales = np.ascontiguousarray(a["scales"])[..., None].view(np.uint8)
            d = a["d"].astype(np.float32)[..., None]
            if tiles.type is GGMLType.Q6_K:
                high = words(a["qh"]) >> (2 * (2 * h + s)) & 3
                scale = d * scales.view(np.int8)[..., 2 * s + h].astype(np.float32)
                out.append(scale[..., None] * ((low | high << 4).astype(np.float32) - 32))
                continue
            if tiles.type is GGMLType.Q5_K:
                byte = np.ascontiguousarray(a["qh"][..., h, :, :])[..., None].view(np.uint8)
                bits = np.stack([byte >> (j + 4 * s) & 1 for j in range(4)], axis=-2)
                low = low | bits.reshape(low.shape) << 4
            scale = (d * scales[..., s].astype(np.float32))[..., None]
            minimum = (a["dmin"].astype(np.float32)[..., None] * scales[..., 2 + s].astype(np.float32))[
                ..., None
            ]
            out.append(scale * low.astype(np.float32) - minimum)
    halves = np.stack(out, axis=-2)
    return halves.reshape(*halves.shape[:-2], 2, 2, 16)


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0])
def test_each_lane_holds_its_row_and_64_columns(type):
    rows = random_rows(type, SHAPE)
    tiles = to_gpu_tiles(rows)
    assert tiles.nbytes == rows.nbytes
    w = lane_weights(tiles)
    leading, n, k = SHAPE
    w = w.reshape(leading, n // 8, k // SUPERBLOCK, 8, SUPERBLOCK).transpose(0, 1, 3, 2, 4)
    np.testing.assert_array_equal(w.reshape(SHAPE), dequantize(rows))


@pytest.mark.parametrize("type", TILED_TYPES)
def test_jax_makes_the_same_tiles(type):
    rows = random_rows(type, SHAPE)
    host = to_gpu_tiles(rows)
    on_device = to_gpu_tiles(PackedTensor({k: jnp.asarray(v) for k, v in rows.arrays.items()}, type), jnp)
    assert on_device.arrays.keys() == host.arrays.keys()
    for name, array in host.arrays.items():
        np.testing.assert_array_equal(np.asarray(on_device.arrays[name]), array, err_msg=name)


@pytest.mark.parametrize("type", TILED_TYPES)
def test_size_is_within_four_percent_of_the_file(type):
    tiles = to_gpu_tiles(random_rows(type, SHAPE))
    block = BLOCK_FORMATS[type]
    assert tiles.nbytes <= 1.04 * (np.prod(SHAPE) // block.weights * block.nbytes)


@pytest.mark.parametrize(
    ("type", "shape", "name"),
    [(GGMLType.F16, (16, 256), "F16"), (GGMLType.Q4_K, (12, 256), "rows in eights")],
)
def test_what_tiles_cannot_hold_is_named(type, shape, name):
    with pytest.raises(NotImplementedError, match=name):
        to_gpu_tiles(random_rows(type, shape))
