"""Products of packed matrices in float64, and how far a backend's may be from them."""

import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.parity.noise import FLOAT32, INT15, careful_sigma, plain_sigma, rounded
from qwen3_moe_jax.reference.ops import silu

WEIGHTS_AT_A_TIME = 1 << 17
"""Weights of a matrix that are there in float64 at a time: 1 MiB, so that products find them in cache."""

MAX_SILU_SLOPE = 1.1
"""The derivative of silu is at most 1.0999."""


def products(
    x: np.ndarray,
    weight: PackedTensor,
    operand: float,
    *,
    careful: bool = False,
    variance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Products with every row of a matrix, made a few rows at a time.

    Args:
      x: float64 [T, K].
      weight: packed [N, K].
      operand: relative precision to which operands are rounded.
      careful: allow what ``noise.careful_sigma`` does.
      variance: float64 [T, K], of x.

    Returns:
      The product, its deviation by rounding, and its variance by that of x (zeros where none is given):
      float64 [T, N] each.
    """
    value, sigma, spread = (np.zeros((len(x), weight.shape[0])) for _ in range(3))
    stride = max(1, WEIGHTS_AT_A_TIME // weight.shape[1])
    for start in range(0, weight.shape[0], stride):
        rows = slice(start, start + stride)
        near = dequantize(weight[rows])
        dense = near.astype(np.float64)
        value[:, rows] = x @ dense.T
        if not careful:
            sigma[:, rows] = plain_sigma(x, near, operand)
        if variance is not None:
            spread[:, rows] = variance @ np.square(dense, out=dense).T
    return value, careful_sigma(x, weight, operand) if careful else sigma, spread


def coherent_spread(
    x: np.ndarray,
    matrices: tuple[PackedTensor, PackedTensor, PackedTensor],
    true: tuple[np.ndarray, np.ndarray],
    operand: float,
) -> np.ndarray:
    """Variance [T, N] of an expert's output where the errors of its inner channels are alike.

    Float32 sums: the errors of all channels of one sign. Rounded operands: what
    rounding x, and x and the weights, does to the output.

    Args:
      x: float64 [T, D].
      matrices: gate, up and down of the expert.
      true: products of x with gate and up, float64 [T, F].
      operand: relative precision to which operands are rounded.
    """
    gate, up = true
    projections, down = matrices[:2], dequantize(matrices[2]).astype(np.float64)
    sigmas = [careful_sigma(x, p, FLOAT32) for p in projections]
    error = MAX_SILU_SLOPE * np.abs(up) * sigmas[0] + np.abs(silu(gate)) * sigmas[1]
    spread = (error @ np.abs(down).T) ** 2
    if operand <= FLOAT32:
        return spread
    dense = [dequantize(p, np.float64) for p in projections]
    near = rounded(x, operand)
    also = [] if operand == INT15 else [[rounded(w, operand) for w in dense]]
    for pair in (dense, *also):
        gate_near, up_near = (near @ w.T for w in pair)
        spread += ((silu(gate_near) * up_near - silu(gate) * up) @ down.T) ** 2
    return spread
