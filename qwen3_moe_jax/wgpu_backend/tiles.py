"""Which kernel computes a product of a long prompt: tile_bytes.wgsl, tile.wgsl or matmul.wgsl."""

from collections.abc import Sequence
from typing import Any, Protocol

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.wgpu_backend.adapter import Block, Tiles, Tuning
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.sites import Site

COLUMNS = 32
"""Of a step of tile.wgsl, and of activations that share a scale in rounded.wgsl."""
ROUNDED_VECTORS = 5
"""Of 16 bytes for each of them there."""
MIN_TILES = 8
"""Tiles of rows below which matrices go to matmul.wgsl: too few workgroups would keep a device busy."""

_OWN_ORDER = {GGMLType.Q4_K: 1, GGMLType.Q5_K: 1, GGMLType.Q6_K: 2}
"""Types that tile.wgsl reads in another order of columns than one after the other."""
_OF_BYTES = frozenset(_OWN_ORDER)
"""Types that tile_bytes.wgsl computes."""
_ROUNDING_LANES = 64


class Matrix(Protocol):
    """A matrix, or one of a stack: its type and shape."""

    @property
    def type(self) -> GGMLType: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


def _suits(matrices: Sequence[Matrix]) -> bool:
    """Whether kernels of tiles compute stacks side by side: they share the activations' order."""
    return matrices[0].columns % COLUMNS == 0 and len({_OWN_ORDER.get(m.type, 0) for m in matrices}) == 1


def is_by_bytes(tiles: Tiles, matrices: Sequence[Matrix]) -> bool:
    """Whether tile_bytes.wgsl computes them, where two lanes unpack a row."""
    return tiles.dots is not None and _OF_BYTES.issuperset(m.type for m in matrices)


def dense_kernel(tiles: Tiles | None, matrices: Sequence[Matrix], *, wide: bool) -> tuple[str, Block | None]:
    """The kernel for matrices side by side, and its sizes: "tile_bytes", "tile", or "matmul" and None.

    Args:
      tiles: of the device's settings.
      matrices: of one dispatch; they have the same columns.
      wide: whether the prompt is long.
    """
    if not tiles or not wide or matrices[0].columns % COLUMNS:
        return "matmul", None
    name, block = ("tile_bytes", tiles.dots) if is_by_bytes(tiles, matrices) else ("tile", tiles)
    enough = block and sum(m.rows for m in matrices) >= MIN_TILES * block.rows
    return (name, block) if enough else ("matmul", None)


def expert_tile(tuning: Tuning, groups: Sequence[Sequence[Matrix]]) -> int:
    """Tokens of the tiles of a layer's experts in a long prompt; the groups are stacks of one dispatch each.

    All of them share the tiles: narrow ones where one group does not suit the kernels of wide ones.
    """
    tiles = tuning.tiles
    if not tiles or not all(_suits(group) for group in groups):
        return tuning.prefill_tokens
    by_bytes = tiles.dots and all(is_by_bytes(tiles, group) for group in groups)
    return tiles.dots.tokens if tiles.dots and by_bytes else tiles.tokens


def expert_kernel(tiles: Tiles | None, matrices: Sequence[Matrix], tokens: int) -> tuple[str, Block | None]:
    """As :func:`dense_kernel`, for one stack of experts or for gate and up, by tiles of so many tokens."""
    if tiles and tiles.dots and tokens == tiles.dots.tokens and is_by_bytes(tiles, matrices):
        return "tile_bytes", tiles.dots
    return ("tile", tiles) if tiles and tokens == tiles.tokens else ("matmul", None)


def constants(block: Block) -> dict[str, Any]:
    """Of the kernels of tiles."""
    return {
        "ROWS": block.rows,
        "TOKENS": block.tokens,
        "LANE_ROWS": block.lane_rows,
        "LANE_TOKENS": block.lane_tokens,
    }


def vectors_of_row(name: str, columns: int) -> int:
    """Vectors of 16 bytes of a row of activations, as the kernel of this name reads it."""
    return columns // COLUMNS * ROUNDED_VECTORS if name == "tile_bytes" else columns // 4


def rounded_nbytes(values: int) -> int:
    """Bytes of so many activations, a multiple of COLUMNS, after rounded.wgsl."""
    return 16 * ROUNDED_VECTORS * values // COLUMNS


def rounding_site(device: Device, x: Any, rounded: Any, step: Any, values: int) -> Site:
    """Writes x, ``values`` floats of each token, to ``rounded`` as tile_bytes.wgsl reads it."""
    blocks = values // COLUMNS
    kernel = device.kernel("rounded", WG=_ROUNDING_LANES)
    dispatch = device.bind(kernel, {0: device.uniform(blocks), 1: step, 2: x, 3: rounded})
    return Site(dispatch, -(-blocks // _ROUNDING_LANES), "tokens")
