"""embedding_lookup in plain jnp: gather the packed rows, then dequantize them."""

import jax

from convert.packed import PackedTensor
from kernels_pallas.dequantize import dequantize


@jax.jit
def embedding_lookup(w: PackedTensor, token_ids: jax.Array) -> jax.Array:
    """See ``api.embedding_lookup``."""
    return dequantize(w[token_ids])
