"""Tables of rotary positions' angles, in NumPy."""

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig


def rope_tables(config: Qwen3MoeConfig, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position's angles: two float32 arrays [num_positions, H / 2].

    Angles are taken in float64 and rounded once, so that far positions keep their phase.
    """
    inv_freq, magnitude = config.rope_frequencies()
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq
    return (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)
