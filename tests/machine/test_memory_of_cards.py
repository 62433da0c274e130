"""What a card of 24 GB holds: the full-size model with a long context, said before anything is loaded."""

import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.memory import MemoryPlan, cache_nbytes

CONFIG = PRESETS["Qwen3-30B-A3B"]
CARD = Headroom(int(22.8e9), "RTX 4090")
"""95 % of 24 GB."""
CHUNK = 512
"""Positions of a cache beyond its context: the longest chunk of a prompt."""


def plan(context: int, itemsize: int) -> MemoryPlan:
    types = q4_k_m_types(CONFIG)
    weights = sum(packed_nbytes(types[spec.path], spec.shape) for spec in tensor_specs(CONFIG))
    return MemoryPlan(weights, cache_nbytes(CONFIG, context + CHUNK, itemsize), context)


@pytest.mark.parametrize("itemsize", [1, 2], ids=["int8", "16 bits"])
def test_the_full_size_model_fits_with_a_context_of_32k(itemsize):
    plan(32768, itemsize).check(CARD)


def test_what_does_not_fit_names_the_context_that_does():
    with pytest.raises(MemoryPlanError, match=r"fit RTX 4090, 22.80 GB free: max_context=3\d{4} would"):
        plan(65536, 2).check(CARD)
    plan(33000, 2).check(CARD)
