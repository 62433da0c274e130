"""RMS norm and rotary position embedding with YaRN: small ops that XLA fuses by itself.

RoPE is the NEOX form: pairs (j, j + H/2), angle ``position * rope_theta ** (-2j/H)``.
YaRN follows Peng et al. 2023 (https://arxiv.org/abs/2309.00071) in the form that
llama.cpp and transformers share: a linear ramp over dimensions between
``beta_fast`` and ``beta_slow`` rotations, magnitude ``1 + 0.1 ln(factor)``.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class RopeScalingLike(Protocol):
    """What :func:`rope_tables` reads of ``qwen3_moe_jax.convert.config.RopeScaling``."""

    type: str
    factor: float
    original_max_position_embeddings: int | None
    attention_factor: float | None
    beta_fast: float
    beta_slow: float


def rms_norm(x: jax.Array, w: jax.Array, eps: float) -> jax.Array:
    """``x / rms(x) * w`` over the last axis, in float32.

    Args:
      x: float32 or bfloat16 [..., D].
      w: [D].
      eps: added to the mean square.

    Returns:
      float32 [..., D].
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * w.astype(jnp.float32)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (j, j + H/2).

    Args:
      x: float32 or bfloat16 [B, T, heads, H].
      cos: float32 [B, T, H/2] from :func:`rope_tables`.
      sin: as cos.

    Returns:
      float32 [B, T, heads, H].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(
    head_dim: int, rope_theta: float, rope_scaling: RopeScalingLike | None = None
) -> tuple[np.ndarray, float]:
    """Radians a position for each pair, float64 [H/2], and the magnitude of cos and sin.

    ``rope_scaling.attention_factor``, where given, is the magnitude itself (as in transformers).

    Raises:
      ValueError: an unknown scaling type.
    """
    pair = np.arange(head_dim // 2)
    frequencies = float(rope_theta) ** (-2.0 * pair / head_dim)
    if rope_scaling is None:
        return frequencies, 1.0
    if rope_scaling.type == "linear":
        given = rope_scaling.attention_factor
        return frequencies / rope_scaling.factor, 1.0 if given is None else given
    if rope_scaling.type != "yarn":
        raise ValueError(f"rope_scaling.type must be linear or yarn, not {rope_scaling.type!r}")

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        context = rope_scaling.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope_theta))

    low = max(math.floor(pair_of(rope_scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope_scaling.beta_slow)), head_dim - 1)
    interpolated = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
    magnitude = rope_scaling.attention_factor
    if magnitude is None:
        magnitude = 1.0 + 0.1 * math.log(rope_scaling.factor) if rope_scaling.factor > 1 else 1.0
    scaled = frequencies / rope_scaling.factor
    return scaled * interpolated + frequencies * (1.0 - interpolated), magnitude


def rope_tables(
    positions: jax.Array, head_dim: int, rope_theta: float, rope_scaling: RopeScalingLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position and pair, scaled by YaRN's magnitude.

    A float32 product ``position * frequency`` is off by 0.01 rad at position
    200,000. Here a turn is 2**48 units and the product is taken modulo a turn in
    integers, so that the tables are right to float32 at any position.

    Args:
      positions: int32 [...].
      head_dim: H.
      rope_theta: the base.
      rope_scaling: None, or linear or YaRN scaling.

    Returns:
      float32 [..., H/2] each.
    """
    frequencies, magnitude = rope_frequencies(head_dim, rope_theta, rope_scaling)
    units = np.rint(frequencies / (2 * math.pi) * 2.0**48).astype(np.uint64)
    high = (units >> np.uint64(16)).astype(np.uint32)
    low = (units & np.uint64(0xFFFF)).astype(np.float32)
    position = positions[..., None]
    wrapped = jax.lax.bitcast_convert_type(position.astype(jnp.uint32) * high, jnp.int32)
    turns = wrapped.astype(jnp.float32) * 2.0**-32 + position.astype(jnp.float32) * (low * 2.0**-48)
    angle = turns * (2 * math.pi)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
