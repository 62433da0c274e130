"""What a call of a compiled program costs before the device has work: counted, for time depends on load."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.program_arguments import memory_key

CALLS_PER_ARRAY = 8
"""Of functions, Python's and C's, for each argument of a warm call. It was 20 while dtypes were made text:
1 ms per call with the 79 arrays of a model, 35 us for each of the 32 tokens that one call writes."""


def total(arrays: list[jax.Array]) -> jax.Array:
    return sum(a.astype(jnp.float32).sum() for a in arrays)


def calls_of(program: programs.Program, count: int) -> int:
    """Functions that a warm call enters with ``count`` arrays."""
    arrays = [jnp.ones(2, (jnp.bfloat16, jnp.int32)[i % 2]) for i in range(count)]
    program(arrays)
    events = []
    sys.setprofile(lambda frame, event, _: events.append(event))
    try:
        program(arrays)
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def test_a_warm_call_does_little_for_each_array():
    program = programs.Program(total)
    few, many = calls_of(program, 10), calls_of(program, 50)
    assert (many - few) / 40 <= CALLS_PER_ARRAY


def test_arrays_and_their_shapes_have_one_key():
    static = {"rows": 1}
    array, shape = jnp.ones((2, 3), jnp.bfloat16), jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    assert memory_key(static, {"x": array}) == memory_key(static, {"x": shape})
    assert memory_key(static, {"x": np.float32(1)}) == memory_key(static, {"x": jnp.float32(1)})
    assert memory_key(static, {"x": 1.0}) != memory_key(static, {"x": jnp.float32(1)}), "its type is weak"
    assert memory_key(static, {"x": array}) != memory_key({"rows": 2}, {"x": array})


def test_a_traces_values_are_a_part_of_that_trace():
    program = programs.Program(total)
    arrays = [jnp.ones(3), jnp.ones(4)]
    assert jax.jit(program)(arrays) == 7
    assert program.count() == 0
    with pytest.raises(TypeError, match="total is asked about with a trace's values"):
        jax.jit(lambda arrays: program.is_ready(arrays))(arrays)
