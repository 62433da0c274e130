"""What a lane unpacks on a GPU: its instructions carried out in NumPy, against ggml's weights."""

from functools import reduce

import jax
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from jaxlib.mlir.dialects import arith

from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.kernels_pallas.gpu import unpack_sm90
from qwen3_moe_jax.kernels_pallas.gpu.activations import WEIGHT_SCALE, operand_order
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import PIECE, PIECES, SLAB_ROWS, TILE_ARRAYS, WarpTiles
from tests.kernels.op_inputs import random_weights, rng

__all__ = ["rng"]

TILES = WarpTiles(0, 0, 2, 1)
"""The eight tiles of a slab, one after the other."""
RELATIVE_ERROR = 2.0**-9
"""Float16 scales and products are rounded, of a difference both terms: half a unit of the last place each."""


def halves(word: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(word, 32)).view(np.float16).reshape(32, 2).astype(np.float64)


def word(pair: np.ndarray) -> np.ndarray:
    return pair.astype(np.float16).view(np.uint32).reshape(32)


def permuted(a, b, by) -> np.ndarray:
    a, b, by = (np.broadcast_to(np.uint32(v), 32) for v in (a, b, by))
    held = np.stack([of >> np.uint32(8 * i) & 0xFF for of in (a, b) for i in range(4)])
    selectors = [by >> np.uint32(4 * i) & 0xF for i in range(4)]
    assert all((s < 8).all() for s in selectors), "a selector's sign bit copies signs"
    chosen = [
        np.take_along_axis(held, s[None].astype(int), 0)[0] << np.uint32(8 * i)
        for i, s in enumerate(selectors)
    ]
    return reduce(np.bitwise_or, chosen)


class NumPyLane(unpack_sm90._Lane):
    """All 32 lanes of a warp; a value is uint32 [32]."""

    def __init__(self, type, arrays, tiles, quarter):
        self.type, self.quarter, self.tiles = type, quarter, tiles
        self.subblock, self.half = divmod(quarter, 2)
        self.pointers, self.lane = arrays, np.arange(32, dtype=np.uint32)

    def const(self, value):
        return np.uint32(value)

    def words(self, name, tile, vector):
        found = self.pointers[name][tile].view(np.uint32).reshape(-1, 32, 4)[vector]
        return list(found.T)

    def word(self, name, tile, vector=0):
        return self.pointers[name][tile].view(np.uint32).reshape(-1, 32)[vector]

    def half_float(self, name, tile, *, each_lane):
        found = self.pointers[name][tile].view(np.uint16).reshape(-1).astype(np.uint32)
        return found if each_lane else np.repeat(found, 4)

    def ptx(self, code, *args):
        name = code.split()[0]
        if name == "fma.rn.f16x2":
            a, b, c = map(halves, args)
            return word(a * b + c)
        if name == "mul.rn.f16x2":
            a, b = map(halves, args)
            return word(a * b)
        if name == "prmt.b32":
            a, b, by = (operand.strip(" ;") for operand in code.split(",")[1:])
            value = lambda text: args[int(text[1:]) - 1] if text[0] == "$" else int(text, 0)
            return permuted(*map(value, (a, b, by)))
        assert "cvt.rn.f16.f32" in code
        number = np.broadcast_to(args[0], 32).astype(np.uint32).view(np.float32)
        return word(np.repeat(number, 2))


@pytest.fixture
def numpy_arithmetic(monkeypatch):
    shift = lambda move: lambda a, b: move(np.uint32(a), np.uint32(b))
    operations = {
        "andi": np.bitwise_and,
        "ori": np.bitwise_or,
        "xori": np.bitwise_xor,
        "addi": np.add,
        "minui": np.minimum,
        "shli": shift(np.left_shift),
        "shrui": shift(np.right_shift),
    }
    for name, operation in operations.items():
        monkeypatch.setattr(arith, name, operation)


@pytest.mark.parametrize("type", TILE_ARRAYS, ids=lambda t: t.name)
def test_a_lane_unpacks_its_weights(rng, numpy_arithmetic, type):
    """By its instructions and by the emulation: the same bits, near the exact weights."""
    w = random_weights(rng, type, (SLAB_ROWS, 256))
    tiles = to_gpu_tiles(w)
    arrays = {name: np.asarray(a) for name, a in tiles.arrays.items()}
    exact = dequantize(w).astype(np.float64)[:, operand_order(256)] * WEIGHT_SCALE
    for quarter in range(PIECES):
        rows = []
        for tile in range(SLAB_ROWS // 8):
            lane = NumPyLane(type, arrays, None, quarter)
            pairs = np.stack([[halves(v) for v in of] for of in lane.tile_pairs(tile)])  # [j, c, lane, b]
            rows.append(pairs.reshape(4, 2, 8, 4, 2).transpose(2, 0, 1, 3, 4).reshape(8, PIECE))
        found = np.concatenate(rows)
        piece = exact[:, quarter * PIECE : (quarter + 1) * PIECE]
        spread = np.abs(exact).max()
        np.testing.assert_allclose(
            found, piece, rtol=0, atol=RELATIVE_ERROR * spread, err_msg=f"quarter {quarter}"
        )
        emulated = unpack_sm90.piece_operand(type, arrays, TILES, quarter, 0, emulate=True)
        np.testing.assert_array_equal(
            found, np.asarray(emulated).astype(np.float64), err_msg=f"quarter {quarter}"
        )
