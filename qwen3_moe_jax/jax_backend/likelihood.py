"""Log-likelihoods of a text's own tokens on the device: one number a token leaves it, never logits."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.jax_backend.generate import COMPILER_OPTIONS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.programs import Program

HEAD_ROWS = 128
"""Rows of logits that are on the device at once: 78 MB for Qwen3's vocabulary of 151,936."""


def log_likelihoods(
    model: Qwen3Moe,
    params: Params,
    cache: KVCache,
    token_ids: Sequence[int] | NDArray[np.int32],
    chunks: Sequence[int],
    first: int = 1,
) -> np.ndarray:
    """``ln p(token_ids[i] | token_ids[:i])`` of every i from ``first`` on.

    Args:
      model, params: the network.
      cache: an empty cache of one sequence, as long as ``chunks`` in all; donated.
      token_ids: T ids.
      chunks: lengths of the pieces that T - 1 of them run in; the last may be padded.
      first: at least 1. The vocabulary is left out for chunks that end before it.

    Returns:
      float32 [T - first], from a float32 log-softmax.
    """
    inputs = np.zeros((2, sum(chunks)), np.int32)
    inputs[:, : len(token_ids) - 1] = token_ids[:-1], token_ids[1:]
    parts, start = [], 0
    for chunk in chunks:
        ids, targets = inputs[:, None, start : start + chunk]
        found, cache = _score_chunk(
            model, params, cache, ids, targets, jnp.full((1,), start), start + chunk >= first
        )
        parts.append(found[0])
        start += chunk
    return np.concatenate(parts)[first - 1 : len(token_ids) - 1]


@partial(Program, static_argnames=("model",), donate_argnames=("cache",), compiler_options=COMPILER_OPTIONS)
def _score_chunk(
    model: Qwen3Moe,
    params: Params,
    cache: KVCache,
    token_ids: jax.Array,
    targets: jax.Array,
    start: jax.Array,
    wanted: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """A chunk of tokens [B, T]: log-likelihoods float32 [B, T] of their targets, zeros unless wanted."""
    network = model.bind(params)
    output = network(token_ids, cache, start)

    def score_rows(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, ids = rows
        logits = model.bind(params).logits(hidden)
        of_target = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return of_target - jax.nn.logsumexp(logits, axis=-1)

    def score() -> jax.Array:
        batch, length = token_ids.shape
        rows = min(HEAD_ROWS, length)
        pieces = [
            jnp.moveaxis(x.reshape(batch, -1, rows, *x.shape[2:]), 1, 0) for x in (output.hidden, targets)
        ]
        return jnp.moveaxis(jax.lax.map(score_rows, tuple(pieces)), 0, 1).reshape(batch, length)

    zeros = partial(jnp.zeros, token_ids.shape, jnp.float32)
    return jax.lax.cond(wanted, score, zeros), output.cache
