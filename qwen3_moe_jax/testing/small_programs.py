"""Programs that compile at once, for tests of what is done with those that take long."""

from functools import partial

import jax

from qwen3_moe_jax.jax_backend.programs import Program


@partial(Program, is_long=True)
def doubled(x: jax.Array) -> jax.Array:
    """Twice ``x``."""
    return 2 * x
