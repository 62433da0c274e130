"""The settings of JAX that this backend computes under, whatever the process has set.

``jax_enable_x64``, strict promotion of dtypes or ranks, the default precision of matrix products and those of
random numbers belong to the user's process, and change the meaning of the same lines of code. Text, logits
and random draws of a model must not depend on them. JAX keeps compiled functions by these settings, so a
program that is called under them is the same program.
"""

from collections.abc import Generator
from contextlib import contextmanager

import jax

RANDOM_BITS = "threefry2x32"
"""What a seed means, on every device and in every version of JAX."""


@contextmanager
def own_settings() -> Generator[None]:
    """A context, or the decorator ``@own_settings()`` of a function that is no generator."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(None),
        jax.default_prng_impl(RANDOM_BITS),
        jax.threefry_partitionable(True),
    ):
        yield
