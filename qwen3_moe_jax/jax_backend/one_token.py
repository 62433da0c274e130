"""One token of more sequences than the decode kernel takes, as a program without a branch or a condition.

A GPU waits for the host at both, and the host for the GPU: such a program is asked for while the one before
it runs. In a branch, a step that is no loop makes XLA copy the cache, so the choice is the host's.
"""

from functools import partial

import jax.numpy as jnp

from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.generate import DecodeState, StepResult, begin, end, long_program, write_tokens
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.jax_backend.token_choice import GREEDY, NARROW

WORKS = (GREEDY, NARROW)
"""What it may have to do to choose tokens (``token_choice.work_of``): a program for each."""


@partial(long_program, static_argnames=("decoder", "rows", "work"))
def decode_one(
    decoder: Decoder, params: Params, state: DecodeState, *, rows: int, work: int
) -> tuple[DecodeState, StepResult]:
    """As ``generate.decode`` of one token; who is ready has no mask and asks for ``work`` at most."""
    one = jnp.int32(1)
    now = begin(state, rows, one)
    return end(state, write_tokens(decoder, params, state, one, now, work=work, launches=1))
