"""Compiles what a first answer needs while the weights are still being read.

Shapes are enough for that: a jitted function that has been lowered and compiled for the shapes, dtypes and
devices of its arguments is not traced or compiled again when it is called with them.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_moe_jax import generate
from qwen3_moe_jax.generate import PREFILL_CHUNKS, DecodeState, Params
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.model import Qwen3Moe


class CompileAhead:
    """The programs that read a short prompt and write one sequence, each compiled in a thread."""

    def __init__(
        self,
        model: Qwen3Moe,
        params: Params,
        *,
        capacity: int,
        cache_length: int,
        cache_dtype: Any,
        device: jax.Device,
    ):
        """Begins.

        Args:
          model: the network.
          params: shapes of its parameters (``params.param_shapes``).
          capacity: tokens that the sequence may have.
          cache_length: positions of its cache.
          cache_dtype: of its cache.
          device: where everything is going to be.
        """

        def empty_state() -> DecodeState:
            cache = KVCache.create(model.config, 1, cache_length, cache_dtype)
            return DecodeState.empty(cache, capacity, model.config.vocab_size)

        bound = jax.sharding.SingleDeviceSharding(device)
        state = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=bound), jax.eval_shape(empty_state)
        )
        one, slots = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        programs = (
            partial(generate.prefill.lower, model, params, state, slots, chunk=PREFILL_CHUNKS[0], rows=0),
            partial(generate.decode.lower, model, params, state, one, rows=1),
        )
        self._threads = [
            threading.Thread(target=_compile, args=(lower,), name="compile ahead") for lower in programs
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Returns when all is compiled; whoever calls the functions before compiles them a second time."""
        for thread in self._threads:
            thread.join()


def _compile(lower: Callable[[], jax.stages.Lowered]) -> None:
    try:
        lower().compile()
    except Exception:
        return  # the call fails in the same way, where somebody waits for what it says
