"""Random blocks of the types below Q4_K, of those of 32 weights, of the ternary ones and of MXFP4."""

from functools import cache

import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS
from qwen3_moe_jax.convert.unpack import dequantize, pack

_SPREADS = {
    GGMLType.Q2_K: 8.41 * 1.12,  # scales 4 to 12
    GGMLType.Q3_K: 18.48 * 2.345,
    GGMLType.IQ4_XS: 18.48 * 67.4,
    GGMLType.IQ4_NL: 67.4,
    GGMLType.Q4_0: 4.61,
    GGMLType.Q4_1: 4.61,
    GGMLType.Q5_0: 9.23,
    GGMLType.Q5_1: 9.23,
}
"""The root mean square of a weight of uniform quants, about its mean in types with a minimum."""

_MIDDLES = {GGMLType.Q4_1: 7.5, GGMLType.Q5_1: 15.5, GGMLType.Q2_K: 1.5}
"""The mean of uniform quants of types with a minimum."""

_ONE_MORE_BELOW = (GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.IQ4_NL)
"""Types whose uniform quants have a mean below zero: half of their scales are negative."""


def randomize(blocks: np.ndarray, kind: GGMLType, std: float, mean: float, rng: np.random.Generator) -> None:
    """Gives blocks of random bytes scales for weights of this deviation, in place.

    Args:
      blocks: uint8 [count, bytes of one block].
      kind: their type.
      std: standard deviation of the weights, about.
      mean: of the weights, in deviations; types without a minimum stay at zero.
      rng: source of random numbers.
    """
    if kind is GGMLType.MXFP4:
        set_scale(blocks, kind, "e", _powers_of_two(std / _spread(kind), len(blocks), rng))
        return
    if kind not in _SPREADS:
        set_scale(blocks, kind, "d", std / _spread(kind) * rng.choice((-1, 1), len(blocks)))
        return
    spread = _SPREADS[kind]
    d = np.float16(std / spread)
    _set(blocks, kind, "d", d)
    if kind in _ONE_MORE_BELOW:
        _set(blocks, kind, "d", d * rng.choice((-1, 1), (len(blocks), 1)))
    if kind in (GGMLType.Q4_1, GGMLType.Q5_1):
        _set(blocks, kind, "m", float(d) * (mean * spread - _MIDDLES[kind]))
    if kind is GGMLType.Q2_K:
        scales = rng.integers(4, 13, (len(blocks), 16))
        _set(blocks, kind, "scales", scales | scales << 4)
        _set(blocks, kind, "dmin", float(d) * (_MIDDLES[kind] - mean * 1.12))


def make_constant(blocks: np.ndarray, kind: GGMLType, std: float, rng: np.random.Generator) -> None:
    """Gives blocks of zeros one weight for all of each, in place; with a minimum, a small difference.

    Args: see :func:`randomize`.
    """
    count = len(blocks)
    if kind not in _SPREADS:  # of nothing but zeros, which are one point of a grid, or one digit
        if kind is GGMLType.MXFP4:
            _set(blocks, kind, "q", rng.integers(1, 16, (count, 1)) * 0x11)
        set_scale(blocks, kind, scale_name(kind), std / _spread(kind) * rng.uniform(0.5, 2, count))
        return
    _set(blocks, kind, "q", rng.integers(0, 4 if kind is GGMLType.Q2_K else 16, (count, 1)) * 0x11)
    if kind in (GGMLType.Q2_K, GGMLType.Q3_K):  # the same two bits four times
        _set(blocks, kind, "q", rng.integers(0, 4, (count, 1)) * 0x55)
    noise = 0.1 * rng.standard_normal((count, 1))
    d = std / _SPREADS[kind]
    _set(blocks, kind, "d", d)
    if kind in (GGMLType.Q4_1, GGMLType.Q5_1):
        _set(blocks, kind, "m", -d * (13.5 + noise))
    if kind is GGMLType.Q2_K:
        _set(blocks, kind, "scales", 0x88)
        _set(blocks, kind, "dmin", d * (2.5 + noise))


def scale_name(kind: GGMLType) -> str:
    """The packed array of a type's scales of blocks."""
    return "e" if kind is GGMLType.MXFP4 else "d"


def set_scale(blocks: np.ndarray, kind: GGMLType, name: str, values: np.ndarray) -> None:
    """Writes one scale of every block, wherever the type keeps it.

    Args:
      blocks: uint8 [count, bytes of one block].
      kind: their type.
      name: the packed array that the scale is unpacked to: "d", "dmin", "m" or "e".
      values: [count]; of "e" the nearest power of two is taken, whatever the sign.
    """
    if name == "e":
        with np.errstate(divide="ignore"):
            exponents = np.rint(np.log2(np.abs(values))) + 128
        _set(blocks, kind, "e", np.clip(exponents, 0, 255).reshape(-1, 1))
    elif name not in BLOCK_FORMATS[kind].fields:  # IQ1_M: four bits of each of four words
        field = BLOCK_FORMATS[kind].fields["scales"]
        words = blocks[:, field.offset : field.offset + field.nbytes].view("<u2")
        bits = np.asarray(values, "<f2").view("<u2").reshape(-1, 1)
        words &= 0x0FFF
        words |= (bits >> np.arange(0, 16, 4, dtype=np.uint16)) << 12
    else:
        _set(blocks, kind, name, np.asarray(values).reshape(-1, 1))


def scale_names(kind: GGMLType) -> list[str]:
    """The packed arrays that hold scales of blocks."""
    return [name for name in ("d", "dmin", "m", "e") if name in ARRAY_FORMATS[kind]]


def _powers_of_two(size: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """The powers of two below and above ``size``, so often that their root mean square is ``size``."""
    below = 2.0 ** np.floor(np.log2(size))
    share = ((size / below) ** 2 - 1) / 3
    return np.where(rng.random(count) < share, 2 * below, below)


@cache
def _spread(kind: GGMLType) -> float:
    """The root mean square of a weight of random bytes whose scale is one."""
    fmt = BLOCK_FORMATS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (256, fmt.nbytes), dtype=np.uint8)
    set_scale(blocks, kind, scale_name(kind), np.ones(len(blocks)))
    weights = dequantize(pack(blocks.reshape(-1), kind, (len(blocks), fmt.weights)))
    return float(np.sqrt(np.mean(np.square(weights, dtype=np.float64))))


def _set(blocks: np.ndarray, kind: GGMLType, name: str, values: object) -> None:
    field = BLOCK_FORMATS[kind].fields[name]
    blocks[:, field.offset : field.offset + field.nbytes].view(field.dtype)[...] = values
