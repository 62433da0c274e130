"""Sequences into the slots of a ``DecodeState`` and out of them: jitted programs on the state."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from qwen3_moe_jax.jax_backend.generate import DecodeState
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.token_choice import SamplingArrays


@partial(Program, donate_argnames=("state",))
def admit(
    state: DecodeState,
    slot: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    is_stop: jax.Array,
    sampling: SamplingArrays,
    filled: jax.Array,
    written: jax.Array,
    allowed: jax.Array,
    masked: jax.Array,
) -> DecodeState:
    """Puts a sequence into a slot.

    Args:
      slot: int32 scalar.
      tokens: int32 [S], the prompt's ``length`` tokens and anything after them.
      length: int32 scalar, at least 1.
      limit: int32 scalar, above ``length`` and at most S.
      is_stop: bool [V].
      sampling: of one sequence, [1].
      filled: int32 scalar below ``length``, tokens of the prompt that the row of the cache has already.
      written: int32 scalar below ``length``, its last tokens that count as output.
      allowed: int32 [ceil(V / 32)]; ``masked``: bool scalar.
    """
    positions = jnp.arange(state.capacity)
    is_prompt = positions < length - written
    no = jnp.zeros_like(is_stop)
    row = {
        "tokens": tokens,
        "length": length,
        "filled": filled,
        "limit": limit,
        "finished": False,
        "nonfinite": False,
        "in_prompt": no.at[tokens].max(is_prompt),
        "in_output": no.at[tokens].max(~is_prompt & (positions < length)),
        "is_stop": is_stop,
        "allowed": allowed,
        "masked": masked,
        "held": False,
    }
    changed = {name: getattr(state, name).at[slot].set(value) for name, value in row.items()}
    settings = jax.tree.map(lambda all_, one: all_.at[slot].set(one[0]), state.sampling, sampling)
    return replace(state, **changed, sampling=settings)


@partial(Program, donate_argnames=("state",))
def release(state: DecodeState, slot: jax.Array) -> DecodeState:
    """Empties a slot, whatever its sequence was at. Its row of the cache stays, up to ``filled``."""
    settings = jax.tree.map(lambda all_: all_.at[slot].set(0), state.sampling)  # temperature 0: greedy
    return replace(
        state,
        finished=state.finished.at[slot].set(True),
        masked=state.masked.at[slot].set(False),
        nonfinite=state.nonfinite.at[slot].set(False),
        sampling=replace(settings, repetition_penalty=settings.repetition_penalty.at[slot].set(1)),
    )


@partial(Program, donate_argnames=("state",))
def clear(state: DecodeState, slot: jax.Array) -> DecodeState:
    """Zeros in a slot's cache, which a sequence with NaN leaves behind."""
    return replace(state, cache=state.cache.cleared(slot))
