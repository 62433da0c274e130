"""Log-likelihoods of a text's own tokens on the device: one number per token leaves it, never logits."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.jax_backend.generate import COMPILER_OPTIONS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe

Scores = tuple[jax.Array, jax.Array, jax.Array]
"""Log-likelihoods of tokens, their rivals, and the log-likelihoods of these."""

Scored = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The same on the host, of one text."""

HEAD_ROWS = 128
"""Rows of logits that are on the device at once: 78 MB for Qwen3's vocabulary of 151,936."""


def token_scores(
    model: Qwen3Moe,
    params: Params,
    cache: KVCache,
    token_ids: Sequence[int] | NDArray[np.int32],
    chunks: Sequence[int],
    first: int = 1,
    top: int = 0,
) -> Scored:
    """``ln p(token_ids[i] | token_ids[:i])`` of every i from ``first`` on, and of the likeliest tokens there.

    Args:
      model, params: the network.
      cache: an empty cache of one sequence, as long as ``chunks`` in all; donated.
      token_ids: T ids.
      chunks: lengths of the pieces that T - 1 of them run in; the last may be padded.
      first: at least 1. The vocabulary is left out for chunks that end before it.
      top: how many rivals, of which the most likely come first.

    Returns:
      float32 [T - first], from a float32 log-softmax; int32 [T - first, top]; float32 [T - first, top].
    """
    inputs = np.zeros((2, sum(chunks)), np.int32)
    inputs[:, : len(token_ids) - 1] = token_ids[:-1], token_ids[1:]
    parts, start = [], 0
    for chunk in chunks:
        ids, targets = inputs[:, None, start : start + chunk]
        found, cache = _score_chunk(
            model,
            params,
            cache,
            ids,
            targets,
            np.full((1,), start, np.int32),
            start + chunk >= first,
            top=top,
        )
        parts.append([np.asarray(x[0]) for x in found])
        start += chunk
    own, ids, values = (np.concatenate(x)[first - 1 : len(token_ids) - 1] for x in zip(*parts, strict=True))
    return own, ids, values


@partial(
    Program,
    static_argnames=("model", "top"),
    donate_argnames=("cache",),
    compiler_options=COMPILER_OPTIONS,
    is_long=True,
)
def _score_chunk(
    model: Qwen3Moe,
    params: Params,
    cache: KVCache,
    token_ids: jax.Array,
    targets: jax.Array,
    start: jax.Array,
    wanted: jax.Array,
    *,
    top: int,
) -> tuple[Scores, KVCache]:
    """A chunk of tokens [B, T]: log-likelihoods float32 [B, T] of their targets, and ``top`` rivals of each
    [B, T, top]; zeros unless wanted."""
    network = model.bind(params)
    output = network(token_ids, cache, start)

    def score_rows(rows: tuple[jax.Array, jax.Array]) -> Scores:
        hidden, ids = rows
        logits = model.bind(params).logits(hidden)
        of_target = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        if not top:
            none = jnp.zeros((*ids.shape, 0))
            return of_target - total, none.astype(jnp.int32), none
        values, rivals = ops.top_k(logits.reshape(-1, logits.shape[-1]), top)
        shape = (*ids.shape, top)
        return (
            of_target - total,
            rivals.astype(jnp.int32).reshape(shape),
            values.reshape(shape) - total[..., None],
        )

    def score() -> Scores:
        batch, length = token_ids.shape
        rows = min(HEAD_ROWS, length)
        pieces = [
            jnp.moveaxis(x.reshape(batch, -1, rows, *x.shape[2:]), 1, 0) for x in (output.hidden, targets)
        ]
        whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])
        own, rivals, values = jax.lax.map(score_rows, tuple(pieces))
        return whole(own), whole(rivals), whole(values)

    def zeros() -> Scores:
        return (
            jnp.zeros(token_ids.shape, jnp.float32),
            jnp.zeros((*token_ids.shape, top), jnp.int32),
            jnp.zeros((*token_ids.shape, top), jnp.float32),
        )

    return jax.lax.cond(wanted, score, zeros), output.cache
