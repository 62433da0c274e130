"""What a token costs beside the decode kernel: a GPU launches one for nearly each thing that a loop does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.jax_backend.decode_path import Decoder, LayerByLayer, Step
from qwen3_moe_jax.jax_backend.generate import LAUNCHES, DecodeState
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe

CONFIG = PRESETS["Qwen3-30B-A3B"]

EQUATIONS = 62
"""Of the greedy loop's body but for the step itself; the reduction's body counts, and both platforms' ways to
the largest logit. For an H100, XLA makes two copies and nine kernels of them and of the operands."""

CARRIED = 10
"""Arrays that change from token to token: the cache's two, and what ``LoopState`` names."""


@dataclass(frozen=True)
class OneLaunch(LayerByLayer):
    """A step that is one launch, and no network."""

    is_one_launch: ClassVar[bool] = True

    def step(self, model, params, token_ids, start, cache, expert_ids=None, active=None) -> Step:
        logits = jnp.zeros((len(token_ids), 1, CONFIG.vocab_size))
        return Step(logits, cache, jnp.zeros((1, len(token_ids), 1, 1), jnp.int32), {})


def inner(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield getattr(part, "jaxpr", part)


def everything(jaxpr: Any) -> Iterator[Any]:
    """All equations that do something, those inside of others too, but for the network's step."""
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "_decode_logits":
            continue
        parts = list(inner(equation))
        if not parts or equation.primitive.name in ("scan", "while"):
            yield equation
        for part in parts:
            yield from everything(part)


@pytest.fixture(scope="module")
def loops():
    """The loops of a dispatch for one sequence, the greedy ones first."""

    def make():
        cache = KVCache.create(CONFIG, 1, 64, jnp.float16)
        return jax.tree.map(jnp.asarray, DecodeState.empty(cache, 64, CONFIG.vocab_size))

    decoder = Decoder(Qwen3Moe(CONFIG, jnp.bfloat16), (OneLaunch(),))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    traced = generate.decode.trace(decoder, {}, jax.eval_shape(make), steps, rows=1)
    return [e for e in everything(traced.jaxpr.jaxpr) if e.primitive.name in ("scan", "while")]


def test_a_token_does_little_beside_the_kernel(loops):
    for loop in loops[: len(LAUNCHES)]:
        assert loop.primitive.name == "scan", "a loop of a known length asks nothing of the host"
        (body,) = inner(loop)
        names = [e.primitive.name for e in everything(body)]
        assert len(names) <= EQUATIONS, names
        assert len(body.outvars) <= CARRIED + 1, "and the number of the iteration"
