"""top_k in plain jnp: without a sort of whole rows on a CPU, and on a GPU for many rows.

XLA's CPU compiler makes a call of a partial sort of ``lax.top_k``, but only where all uses of the result are
of its k values: whoever reads the largest alone gets a sort of the whole row, 21 times as slow for 64 of
4,096. So there the result is kept from being looked through.

On a GPU: the k largest of a row, the lower index first among equals, lie in the k blocks whose maxima are
the k largest, the lower block first among equals: were one of them in another block, each of those k
blocks would hold a value that comes before it. So two short sorts find them, of the maxima and of the
values in these blocks. As integers in their total order, values compare exactly as ``lax.top_k`` compares
them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 64
"""Neighbouring values of which the largest stands for all: near the square root of 151,936 / 64, so that
both sorts are of about as many values."""
MIN_ROWS = 17
"""With fewer, XLA's sort is one launch that many multiprocessors share."""
_INT32_MIN = np.int32(-(2**31))


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """See ``api.top_k``."""
    rows, columns = x.shape
    whole = lambda x: tuple(lax.top_k(x, k))
    # a barrier each: XLA fails on one that takes both where a program of several devices is partitioned
    kept = lambda x: tuple(map(lax.optimization_barrier, lax.top_k(x, k)))
    by_rows = rows < MIN_ROWS or x.dtype != jnp.float32 or k * BLOCK > columns
    values, ids = lax.platform_dependent(x, cpu=kept, default=whole if by_rows else partial(by_blocks, k=k))
    return values, ids


def by_blocks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The same for float32 rows of at least ``k * BLOCK`` values."""
    rows, columns = x.shape
    blocks = -(-columns // BLOCK)
    padding = ((0, 0), (0, blocks * BLOCK - columns))
    keys = jnp.pad(_keys(x), padding, constant_values=_INT32_MIN).reshape(rows, blocks, BLOCK)
    chosen = jnp.sort(lax.top_k(jnp.max(keys, axis=2), k)[1], axis=1)
    found = jnp.take_along_axis(keys, chosen[:, :, None], axis=1).reshape(rows, k * BLOCK)
    at = lax.top_k(found, k)[1]
    ids = jnp.take_along_axis(chosen, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return jnp.take_along_axis(x, ids, axis=1), ids


def _keys(x: jax.Array) -> jax.Array:
    """int32 that are in the total order of float32 values: -0.0 is below 0.0."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))
