"""Random blocks of Q2_K, Q3_K, IQ4_XS, IQ4_NL and the types of 32 weights with a float16 scale."""

import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType

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


def _set(blocks: np.ndarray, kind: GGMLType, name: str, values: object) -> None:
    field = BLOCK_FORMATS[kind].fields[name]
    blocks[:, field.offset : field.offset + field.nbytes].view(field.dtype)[...] = values
