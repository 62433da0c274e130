"""Generation as one jitted program: prefill in chunks, then a loop of ``decode_step`` on the device.

``generate`` runs until every sequence is finished or has reached ``limit``; the
same compiled program serves streaming, which calls it with a limit a few tokens
ahead. Everything that changes is one pytree, ``DecodeState``, whose buffers are
donated from call to call.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.model import Qwen3Moe
from qwen3_moe_jax.token_choice import SamplingArrays, choose_tokens, penalize

Params = dict[str, Any]
"""Flax's parameter tree, its leaves packed tensors and norm weights."""

COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}
"""One instruction for sixteen rows of weights on CPUs that have it; other platforms ignore it."""

PREFILL_CHUNKS = (16, 128, 512)
"""Lengths of a prefill chunk: a prompt is cut into these, so only these shapes are compiled."""


@struct.dataclass
class DecodeState:
    """A batch of sequences that are being written.

    A sequence of n tokens has its first n - 1 in the cache; the last is the
    next step's input.

    Attributes:
      cache: keys and values, S positions and room for one more chunk.
      tokens: int32 [B, S], prompt and output.
      length: int32 [B], tokens of each sequence.
      finished: bool [B], ended by a stop token (which stays in ``tokens``) or by a full cache.
      nonfinite: bool [B], its logits were NaN or infinite; such a sequence is finished.
      in_prompt: bool [B, V], tokens of the prompt.
      in_output: bool [B, V], tokens written since.
    """

    cache: KVCache
    tokens: jax.Array
    length: jax.Array
    finished: jax.Array
    nonfinite: jax.Array
    in_prompt: jax.Array
    in_output: jax.Array

    @classmethod
    def start(cls, cache: KVCache, prompts: jax.Array, lengths: jax.Array, vocab_size: int) -> "DecodeState":
        """The state before prefill: prompts int32 [B, S] padded at will, lengths [B]."""
        batch, capacity = prompts.shape
        real = jnp.arange(capacity)[None, :] < lengths[:, None]
        rows = jnp.broadcast_to(jnp.arange(batch)[:, None], prompts.shape)
        in_prompt = jnp.zeros((batch, vocab_size), bool).at[rows, prompts].max(real)
        return cls(
            cache=cache,
            tokens=prompts,
            length=lengths,
            finished=jnp.zeros((batch,), bool),
            nonfinite=jnp.zeros((batch,), bool),
            in_prompt=in_prompt,
            in_output=jnp.zeros((batch, vocab_size), bool),
        )


def chunk_lengths(num_tokens: int, sizes: Sequence[int] = PREFILL_CHUNKS) -> list[int]:
    """Chunks that cover a prompt: the longest while they fit, then the shortest that holds the rest."""
    lengths, largest = [], max(sizes)
    while num_tokens > 0:
        lengths.append(largest if num_tokens >= largest else min(c for c in sizes if c >= num_tokens))
        num_tokens -= lengths[-1]
    return lengths


def append_tokens(
    state: DecodeState, logits: jax.Array, sampling: SamplingArrays, stop_ids: jax.Array
) -> DecodeState:
    """Chooses every unfinished sequence's next token from logits [B, V] and writes it down."""
    batch, capacity = state.tokens.shape
    rows = jnp.arange(batch)
    bad = ~jnp.isfinite(logits).all(axis=-1) & ~state.finished
    penalized = penalize(logits, sampling, state.in_prompt, state.in_output) if sampling.penalized else logits
    token = choose_tokens(penalized, sampling, state.length)
    writes = ~state.finished & ~bad
    where = jnp.where(writes, state.length, capacity)  # an index past the end is dropped
    length = state.length + writes
    stopped = (token[:, None] == stop_ids[None, :]).any(axis=-1) | (length >= capacity)
    return state.replace(
        tokens=state.tokens.at[rows, where].set(token, mode="drop"),
        length=length,
        finished=state.finished | bad | (writes & stopped),
        nonfinite=state.nonfinite | bad,
        in_output=state.in_output.at[rows, token].max(writes),
    )


def decode_step(
    model: Qwen3Moe, params: Params, state: DecodeState, sampling: SamplingArrays, stop_ids: jax.Array
) -> DecodeState:
    """One token more for every unfinished sequence."""
    start = state.length - 1
    last = jnp.take_along_axis(state.tokens, start[:, None], axis=1)
    if len(last) <= model.fused_decode:
        from qwen3_moe_jax import gpu_decode  # needs a JAX that has Mosaic GPU

        out = gpu_decode.decode_step(params, model.config, model.types, last[:, 0], start, state.cache)
        logits, cache = out.logits, KVCache(*out.cache)
    else:
        variables = {"params": params}
        output = model.apply(variables, last, state.cache, start)
        logits, cache = model.apply(variables, output.hidden[:, -1], method="logits"), output.cache
    return append_tokens(state.replace(cache=cache), logits, sampling, stop_ids)


@partial(jax.jit, static_argnames="model", donate_argnames="state", compiler_options=COMPILER_OPTIONS)
def generate(
    model: Qwen3Moe,
    params: Params,
    state: DecodeState,
    sampling: SamplingArrays,
    stop_ids: jax.Array,
    limit: jax.Array,
) -> DecodeState:
    """Writes tokens until every sequence is finished or ``limit`` [B] tokens long."""

    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.any(~state.finished & (state.length < limit))

    def step(state: DecodeState) -> DecodeState:
        paused = ~state.finished & (state.length >= limit)
        after = decode_step(
            model, params, state.replace(finished=state.finished | paused), sampling, stop_ids
        )
        return after.replace(finished=after.finished & ~paused)

    return jax.lax.while_loop(unfinished, step, state)


@partial(
    jax.jit,
    static_argnames=("model", "chunk"),
    donate_argnames="state",
    compiler_options=COMPILER_OPTIONS,
)
def prefill_chunk(
    model: Qwen3Moe,
    params: Params,
    state: DecodeState,
    sampling: SamplingArrays,
    stop_ids: jax.Array,
    start: jax.Array,
    chunk: int,
) -> DecodeState:
    """Puts prompt tokens start .. start + chunk - 1 into the cache; the last one gives the first new token.

    Args:
      start: int32 scalar. Tokens after a sequence's end are padding: what they
        write to the cache is overwritten before it is ever seen.
      chunk: one of PREFILL_CHUNKS.
    """
    batch, capacity = state.tokens.shape
    columns = jnp.minimum(start + jnp.arange(chunk), capacity - 1)
    variables = {"params": params}
    output = model.apply(variables, state.tokens[:, columns], state.cache, jnp.full((batch,), start))
    last = jnp.clip(state.length - 1 - start, 0, chunk - 1)
    ends_here = (state.length > start) & (state.length <= start + chunk)

    def first_token(state: DecodeState) -> DecodeState:
        hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
        waiting = state.finished | ~ends_here
        logits = model.apply(variables, hidden, method="logits")
        after = append_tokens(state.replace(finished=waiting), logits, sampling, stop_ids)
        return after.replace(finished=jnp.where(ends_here, after.finished, state.finished))

    state = state.replace(cache=output.cache)
    return jax.lax.cond(jnp.any(ends_here), first_token, lambda s: s, state)


def prefill(
    model: Qwen3Moe,
    params: Params,
    state: DecodeState,
    sampling: SamplingArrays,
    stop_ids: jax.Array,
    lengths: Sequence[int],
) -> DecodeState:
    """Runs the prompts of ``state``, of these ``lengths``, and writes each one's first new token."""
    start = 0
    for chunk in chunk_lengths(max(lengths)):
        state = prefill_chunk(model, params, state, sampling, stop_ids, jnp.int32(start), chunk)
        start += chunk
    return state
