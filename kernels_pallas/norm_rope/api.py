"""RMS norm and rotary position embedding with YaRN: small ops that XLA fuses by itself.

RoPE is the NEOX form: pairs (j, j + H/2); ``convert.rope_scaling`` has the angles.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.rope_scaling import RopeScaling, rope_frequencies


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


def rope_tables(
    positions: jax.Array, head_dim: int, rope_theta: float, rope_scaling: RopeScaling | None = None
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
