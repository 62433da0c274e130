"""Rotary position embedding's frequencies, with linear and YaRN scaling, in NumPy.

One definition for every backend: what differs between scaling types is only
the angle of each pair and one magnitude.

Sources: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071 section 3; llama.cpp at
commit 0c1e57098, ``ggml/src/ggml-cpu/ops.cpp`` (``rope_yarn``) and
``ggml/src/ggml.c`` (``ggml_rope_yarn_corr_dims``).
"""

import math

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig


def rope_frequencies(config: Qwen3MoeConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, and the magnitude of cos and sin.

    Returns:
      inv_freq float64 [H / 2]: pair j of position p turns by ``p * inv_freq[j]``.
      magnitude: factor on cos and sin; 1 without scaling.
    """
    half = config.head_dim // 2
    inv_freq = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.type == "linear":
        return inv_freq / scaling.factor, scaling.attention_factor or 1.0

    def pair_of_rotations(rotations: float) -> float:
        """The pair that turns this often over the original context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low = max(math.floor(pair_of_rotations(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of_rotations(scaling.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    scaled = inv_freq / scaling.factor * ramp + inv_freq * (1.0 - ramp)
    return scaled, scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rope_tables(config: Qwen3MoeConfig, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position's angles: two float32 arrays [num_positions, H / 2].

    Angles are taken in float64 and rounded once, so that far positions keep their phase.
    """
    inv_freq, magnitude = rope_frequencies(config)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq
    return (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)
