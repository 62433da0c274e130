"""A step that reads a sequence's last token and a draft of what follows, and writes what is right of it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from qwen3_moe_jax.jax_backend import consecutive
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.generate import DecodeState, StepResult, last_tokens, long_program
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.token_choice import choose_tokens


@partial(long_program, static_argnames=("decoder",))
def write_draft(
    decoder: Decoder, params: Params, state: DecodeState, draft: jax.Array, count: jax.Array
) -> tuple[DecodeState, StepResult]:
    """Writes 1 to ``count + 1`` tokens of the only slot: those that ``generate.decode`` would write.

    The token after each one is chosen as in decoding, with the random number of its position; a draft is
    right where it is that token. So neither the text nor its distribution depends on the draft. What a wrong
    draft leaves in the cache lies behind ``filled``, where what comes next overwrites it.

    Args:
      state: of one slot, whose sequence has no mask.
      draft: int32 [k], of which the first ``count`` are meant.
      count: int32 scalar.
    """
    rows = len(draft) + 1
    order, length = jnp.arange(rows), state.length[0]
    token_ids = jnp.concatenate([last_tokens(state, 1)[0], draft])
    ends_at = state.filled + jnp.where(state.ready, count + 1, 0)
    step = consecutive.run(decoder, params, token_ids[None], state.filled, ends_at, state.cache)

    def masks() -> tuple[jax.Array, jax.Array]:
        """Each row has seen the drafts before it."""
        shape = (rows, state.in_output.shape[1])
        in_output = jnp.broadcast_to(state.in_output, shape)
        seen = order[:, None] > order[None, :-1]
        return jnp.broadcast_to(state.in_prompt, shape), in_output.at[order[:, None], draft].max(seen)

    sampling = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), state.sampling)
    token, finite = choose_tokens(step.logits[0], sampling, length + order, masks)
    ends = state.is_stop[0, token] | (length + order + 1 >= state.limit[0])
    is_right = (order[:-1] < count) & (token[:-1] == draft) & finite[:-1] & ~ends[:-1]
    reached = jnp.concatenate([state.ready, state.ready & jnp.cumprod(is_right).astype(bool)])
    writes, bad = reached & finite, jnp.any(reached & ~finite)
    added = jnp.sum(writes)
    where = jnp.where(writes, length + order, state.capacity)  # an index past the end is dropped
    before = state.length
    state = replace(
        state,
        cache=step.cache,
        tokens=state.tokens.at[0, where].set(token, mode="drop"),
        length=before + added,
        filled=state.filled + added + bad,
        finished=state.finished | jnp.any(writes & ends) | bad,
        nonfinite=state.nonfinite | bad,
        in_output=state.in_output.at[0, token].max(writes),
    )
    return state, StepResult.of(state, before, rows)
