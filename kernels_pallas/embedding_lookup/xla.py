"""embedding_lookup in plain jnp: gather the packed rows, then dequantize them."""

import jax

from qwen3_moe_jax.convert.packed import LANES16, PackedTensor
from qwen3_moe_jax.kernels_pallas.packed import lanes16 as lanes
from qwen3_moe_jax.kernels_pallas.packed.dequantize import dequantize


@jax.jit
def embedding_lookup(w: PackedTensor, token_ids: jax.Array) -> jax.Array:
    """See ``api.embedding_lookup``."""
    return dequantize(lanes.rows(w, token_ids) if w.layout == LANES16 else w[token_ids])
