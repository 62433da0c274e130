"""Caches of the decode kernel's scripts: what attention has of each kind."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.testing.random_models import SMALL
from scripts._decode_caches import random_cache, real_values


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8], ids=lambda d: d.__name__)
def test_real_values_of_a_random_cache(dtype):
    cache = random_cache(SMALL, 1, 128, dtype)
    keys_and_values, scales = cache[:2], cache[2:]
    factors = [np.asarray(s)[..., None] for s in scales] or [1, 1]
    for found, values, factor in zip(real_values(cache), keys_and_values, factors, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(values) * factor)
