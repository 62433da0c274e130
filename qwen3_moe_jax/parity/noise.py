"""How far rounding may take a matrix product from its exact value.

A departure is an error above ``MAX_SIGMAS`` standard deviations of the rounding
that is allowed. Two models give that deviation. The first costs one more
product and is right for weights of random signs; what departs from it is held
against the second, which is right for every weight.

**Plain.** Operands that are rounded to relative precision u have errors of
deviation ``u sqrt(2/3)`` relative to a product of two, and a float32 sum of K
terms adds ``2^-24 sqrt(K)``, both of ``sqrt(sum (x w)^2)``. This takes terms
for independent, their sum for a random walk, and a weight for one number.

**Careful.** Three things are otherwise where weights have a mean, or are alike:

1. *A weight is a difference.* Q4_K and Q5_K are ``a - b`` with ``a = (d scale) q``
   and ``b = dmin min``, and Q6_K may be computed so with ``b = 32 d scale``; so may
   every type of ``Format.is_difference``. A
   backend may sum ``x a`` and ``x b`` of a subblock apart. What is rounded is as
   large as the terms, not as their difference: powers are those of a and of b.
2. *Sums are no random walks.* Each addition in float32 rounds by ``2^-24`` of the
   partial sum that it makes. A subblock's terms may have one sign, and so may
   the sums of all subblocks. Let ``A`` and ``B`` be the sums of ``x a`` and
   ``x b`` over a subblock. In any order of subblocks, and whether the two are
   subtracted per subblock or per two of them, no partial sum is larger than
   ``M = sum |A - B| + 2 max (|A| + |B|)`` beside the random walk of the terms. K
   additions, whose roundings are independent, make ``2^-24 sqrt(K) M`` (the
   probabilistic bound of Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
3. *Roundings of operands repeat.* Equal operands have equal errors, which add
   up like the terms themselves. No statistics are needed: the operands are
   rounded here as a backend rounds them, and the change of the product, of x
   rounded alone and of w rounded alone, counts as one deviation. Where a scale
   or a minimum is rounded (kernels with 16-bit operands), its 32 weights share
   the error: ``u A`` and ``u B`` of each subblock, at float16's u.

**int15** (a CPU's integer dots) rounds x alone: 256 columns have one scale, their largest magnitude over
16,256, and each is off by at most half of it, evenly spread: a deviation of ``scale / sqrt(12)`` an element,
whatever its own size. So a product has ``sqrt(sum scale^2 / 12 w^2)``, in both models; in the careful one
the rounding of this very x counts as one deviation besides. The integers themselves are exact. 256 columns
that are all below ``INT15_ZERO`` become zero: their scale times a weight's would leave float32's range.

Numbers below ``2^-126`` may become zero in any operand and any product, which
adds ``2^-126 (sum |x| + sum |w| + K)``. Sums above float32's largest number are
no error of a backend: their deviation is infinite.

With float32 operands and K = 2048 the careful model allows about ``1e-4`` of the
root of the power of a matrix with random signs, a tenth of what rounding
to bfloat16 does.
"""

from dataclasses import replace

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.reference.ops import silu

FLUSHED_SIGMOID = float(np.exp(-80.0))
"""A sigmoid below this may be zero: float32's exponential ends at e^-87."""

MAX_SIGMAS = 8.0
"""Among 10^9 normal deviates the largest is expected at 6."""

ROUNDING = {"float64": 2.0**-24, "float32": 2.0**-24, "tensorfloat32": 2.0**-12, "float16": 2.0**-12}
ROUNDING["bfloat16"] = 2.0**-9
ROUNDING["int8"] = 1 / 254
ROUNDING["int15"] = 1 / 32512
"""Largest relative error of rounding to a dtype; float64 runs still read weights that are float32. In an
int8 KV cache it is relative to the largest value of a head's vector, in int15 to that of 256 activations."""

FLOAT32, INT15 = ROUNDING["float32"], ROUNDING["int15"]
FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = 2.0**-126
"""Processors may take float32 numbers below this for zero."""

SUBBLOCK = 32
"""Weights that share a scale, at least where scales are rounded."""

SCALED = 256
"""Columns of activations that share the scale of their 15 bits."""

INT15_ZERO = 1e-30
"""A CPU's integer dots take columns of one scale for zero where all are below this (``native/csrc``)."""

ROWS_AT_A_TIME = 512

_DEPENDENT = 1.5
"""The 32 weights of a subblock take 16 values, so that their roundings are not independent (8.9 of the plain
sigmas were measured in 5 million products of the embedded model in bfloat16)."""


def operand_rounding(operand: float) -> float:
    """Deviation of a product whose two operands are rounded to ``operand``, relative to its terms' root."""
    return _DEPENDENT * operand * (2 / 3) ** 0.5 if operand not in (FLOAT32, INT15) else 0.0


def int15_steps(x: np.ndarray) -> np.ndarray:
    """The scale of each element of x [..., K] in int15: float64, of x's shape."""
    columns = x.shape[-1]
    starts = np.arange(0, columns, SCALED)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    return np.repeat(largest * (2 * INT15), SCALED, axis=-1)[..., :columns]


def _int15_variance(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Variance [T, N] of ``x @ w.T`` from the rounding of x to int15."""
    return (_DEPENDENT**2 / 12) * (int15_steps(x) ** 2 @ np.square(w, dtype=np.float64).T)


def plain_sigma(x: np.ndarray, w: np.ndarray, operand: float) -> np.ndarray:
    """Deviation of ``x @ w.T`` for weights of random signs.

    Args:
      x: float64 [T, K].
      w: float32 or float64 [N, K].
      operand: relative precision to which operands are rounded.

    Returns:
      float64 [T, N].
    """
    x_scale, w_scale = _scale(x), _scale(w)  # squares must stay within float32
    x2, w2 = _squares(x, x_scale), _squares(w, w_scale)
    root = np.sqrt((x2 @ w2.T).astype(np.float64)) * (x_scale * w_scale)
    sigma = (operand_rounding(operand) + FLOAT32 * x.shape[-1] ** 0.5) * root
    return np.hypot(sigma, np.sqrt(_int15_variance(x, w))) if operand == INT15 else sigma


def _scale(values: np.ndarray) -> float:
    """A power of two that brings the largest of finite values near 1; 1 for ordinary ones."""
    largest = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    if not np.isfinite(largest):
        largest = float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))
    return 1.0 if 1e-6 < largest < 1e6 or not largest else 2.0 ** np.floor(np.log2(largest))


def _squares(values: np.ndarray, scale: float) -> np.ndarray:
    """Squares of ``values / scale`` in float32."""
    return np.square(values if scale == 1.0 else values / values.dtype.type(scale), dtype=np.float32)


def careful_sigma(x: np.ndarray, weight: PackedTensor, operand: float) -> np.ndarray:
    """Deviation of the product of x with every row of a packed matrix [N, K], whatever its weights.

    Args:
      x: float64 [T, K].
      weight: packed [N, K].
      operand: relative precision to which operands are rounded.

    Returns:
      float64 [T, N].
    """
    starts = range(0, weight.shape[0], ROWS_AT_A_TIME)
    return np.concatenate([_of_rows(x, weight[s : s + ROWS_AT_A_TIME], operand) for s in starts], axis=-1)


def _of_rows(x: np.ndarray, weight: PackedTensor, operand: float) -> np.ndarray:
    w, count = dequantize(weight, np.float64), x.shape[-1]
    minus = subtracted(weight)
    plus = w + minus
    power = (x * x) @ (plus * plus + minus * minus).T
    between, largest, shared = np.zeros_like(power), np.zeros_like(power), np.zeros_like(power)
    for start in range(0, count, SUBBLOCK):
        part = slice(start, start + SUBBLOCK)
        above, below = x[:, part] @ plus[:, part].T, x[:, part] @ minus[:, part].T
        between += np.abs(above - below)
        np.maximum(largest, np.abs(above) + np.abs(below), out=largest)
        shared += above * above + below * below
    partial = between + 2 * largest
    variance = FLOAT32**2 * count * (power + partial * partial)
    if operand == INT15:
        variance += _int15_variance(x, w) + rounded_changes(x, w, operand)[0] ** 2
    elif operand > FLOAT32:
        variance += operand_rounding(operand) ** 2 * ((x * x) @ (w * w).T) + ROUNDING["float16"] ** 2 * shared
        variance += sum(change**2 for change in rounded_changes(x, w, operand))
    flushed = SMALLEST_NORMAL * (np.abs(x).sum(axis=-1)[:, None] + np.abs(w).sum(axis=-1) + count)
    sigma = np.sqrt(variance) + flushed
    return np.where(np.abs(x) @ (np.abs(plus) + np.abs(minus)).T > FLOAT32_MAX, np.inf, sigma)


def subtracted(weight: PackedTensor) -> np.ndarray:
    """The term b of every weight ``a - b``: float64 [..., N, K], zeros for types without one."""
    if not FORMATS[weight.type].is_difference:
        return np.zeros(weight.shape)
    quants = [name for name in ("q", "qh", "ql") if name in weight.arrays]
    nothing = {name: np.zeros_like(weight.arrays[name]) for name in quants}
    return -dequantize(replace(weight, arrays={**weight.arrays, **nothing}), np.float64)


def rounded_changes(x: np.ndarray, w: np.ndarray, operand: float) -> tuple[np.ndarray, np.ndarray]:
    """How ``x @ w.T`` changes when x alone, and when w alone, is rounded to ``operand`` (int15 leaves w)."""
    if operand == INT15:
        return (rounded(x, operand) - x) @ w.T, np.zeros((x.shape[0], w.shape[0]))
    return (rounded(x, operand) - x) @ w.T, x @ (rounded(w, operand) - w).T


def rounded(values: np.ndarray, operand: float) -> np.ndarray:
    """Rounds float64 values to the reduced dtype whose ``ROUNDING`` this is, in any range; ties to even."""
    if operand == INT15:
        steps = int15_steps(values)
        is_zero = steps < INT15_ZERO * (2 * INT15)
        return np.where(is_zero, 0.0, np.rint(values / np.where(is_zero, 1.0, steps)) * steps)
    mantissa, exponent = np.frexp(values)
    steps = 0.5 / operand
    return np.ldexp(np.rint(mantissa * steps) / steps, exponent)


def swiglu_sigma(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Deviation of ``silu(gate) * up`` in float32."""
    size = np.abs(gate * up)
    sigma = FLOAT32 * (4 + np.abs(gate)) * np.abs(silu(gate) * up) + FLUSHED_SIGMOID * size
    return within_float32(sigma, size)


def within_float32(sigma: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Sigma, infinite where a number of this size on the way has no place in float32."""
    return np.where(size > FLOAT32_MAX, np.inf, sigma)
