"""top_k in three passes that read the rows once, and a sort of k values.

The k largest of a row, the lower place first among equals, lie in the k blocks whose maxima are the k
largest, the lower block first among equals: were one of them in another block, each of those k blocks
would hold a value that comes before it. Which values are the k largest is found without sorting, by
the bits of the k-th.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

BLOCK = 128
"""Neighbouring values of which the first pass keeps the largest."""
_EACH = 16
"""Blocks of one program of the first pass."""
_MAX_BLOCKS = 4096
_MIN_ROWS = 17
"""With fewer, XLA's sort is one launch that many multiprocessors share."""
_INT32_MIN = np.int32(-(2**31))


def top_k(x: jax.Array, k: int, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """See ``api.top_k``.

    Raises:
      NotImplementedError: few rows, x is not float32, k no power of two or as many as all blocks, or rows
        too long.
    """
    rows, columns = x.shape
    blocks = -(-columns // BLOCK)
    if rows < _MIN_ROWS:
        raise NotImplementedError(f"the kernels of top_k are for {_MIN_ROWS} rows or more, not {rows}")
    if x.dtype != jnp.float32 or k & (k - 1) or not k < blocks <= _MAX_BLOCKS or k > BLOCK:
        raise NotImplementedError(f"{k} of {columns} values of {x.dtype} do not suit the kernels of top_k")
    grid = -(-blocks // _EACH)
    maxima = _call("block_maxima", _maxima, (rows, grid), 4, interpret, (rows, grid * _EACH), jnp.float32)(x)
    chosen = _call("choose_blocks", _choose_blocks, (rows,), 4, interpret, (rows, k), jnp.int32)(maxima)
    ids = _call("choose_values", _choose_values, (rows,), 8, interpret, (rows, k), jnp.int32)(x, chosen)
    # The places ascend, so that a stable sort leaves equals in their order.
    down, ids = lax.sort((-jnp.take_along_axis(x, ids, axis=1), ids), dimension=1, num_keys=1)
    return -down, ids


def _call(name: str, body, grid: tuple[int, ...], warps: int, interpret: bool, shape, dtype):
    return pl.pallas_call(
        body,
        name=name,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
    )


def _maxima(x, out) -> None:
    row, first = pl.program_id(0), pl.program_id(1) * _EACH
    shape = (_EACH, BLOCK)
    place = (first + lax.broadcasted_iota(jnp.int32, shape, 0)) * BLOCK + lax.broadcasted_iota(
        jnp.int32, shape, 1
    )
    out[row, pl.ds(first, _EACH)] = jnp.max(_load(x, row, place), axis=1)


def _load(x, row, place: jax.Array) -> jax.Array:
    """Values at these places of a row; minus infinity after its end."""
    inside = place < x.shape[1]
    held = jnp.minimum(place, x.shape[1] - 1)
    return jnp.where(inside, pltriton.load(x.at[row, held]), -jnp.inf)


def _choose_blocks(maxima, out) -> None:
    row, blocks = pl.program_id(0), maxima.shape[1]
    place = lax.iota(jnp.int32, pl.next_power_of_2(blocks))
    _store_largest(_load(maxima, row, place), place, out, row)


def _choose_values(x, chosen, out) -> None:
    row = pl.program_id(0)
    k = chosen.shape[1]
    position = lax.iota(jnp.int32, k * BLOCK)
    place = pltriton.load(chosen.at[row, position // BLOCK]) * BLOCK + position % BLOCK
    _store_largest(_load(x, row, place), place, out, row)


def _store_largest(values: jax.Array, places: jax.Array, out, row) -> None:
    """Writes the places of the largest values, in their order in ``values``."""
    k = out.shape[1]
    bits = lax.bitcast_convert_type(values + 0.0, jnp.int32)
    keys = bits ^ ((bits >> 31) & np.int32(2**31 - 1))  # as integers they order like the values

    def next_bit(i, found):
        tried = found | (jnp.int32(1) << (31 - i))
        is_enough = jnp.sum(jnp.where(keys >= (tried ^ _INT32_MIN), 1, 0)) >= k
        return jnp.where(is_enough, tried, found)

    least = lax.fori_loop(0, 32, next_bit, jnp.int32(0)) ^ _INT32_MIN  # the k-th largest
    above, equal = jnp.where(keys > least, 1, 0), jnp.where(keys == least, 1, 0)
    taken = above + jnp.where(jnp.cumsum(equal) <= k - jnp.sum(above), equal, 0)
    pltriton.store(out.at[row, jnp.cumsum(taken) - taken], places, mask=taken > 0)
