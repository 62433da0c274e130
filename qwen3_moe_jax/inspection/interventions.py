"""Interventions and gradients inside the jitted model, for people who study it.

Everything here goes through ``model.Intervention`` and the stages of
``stages.py``: what is looked at and changed is the model that generates text.
Needs the jax backend.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.core.arguments import check_list, check_number
from qwen3_moe_jax.core.runner_arguments import check_stage
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.qwen3_moe import Intervention
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.settings import own_settings


def ablate_expert(expert: int, layer: int | None = None) -> Intervention:
    """No token is sent to this expert: the next most probable one takes its place.

    Args:
      expert: its id.
      layer: the layer, or None for every layer.
    """
    check_number("expert", expert)
    return Intervention("ffn_moe_logits", partial(_without, experts=(expert,)), layer)


def force_experts(experts: Sequence[int], layer: int | None = None) -> Intervention:
    """Every token is sent to these experts, with the router's own probabilities of them, renormalized.

    Args:
      experts: as many ids as the model uses per token, or more to choose among.
      layer: the layer, or None for every layer.
    """
    chosen = check_list("experts", experts)
    for expert in chosen:
        check_number("an expert", expert)
    return Intervention("ffn_moe_logits", partial(_only, experts=chosen), layer)


def steer(stage: str, vector: np.ndarray, layer: int | None = None, *, scale: float = 1.0) -> Intervention:
    """Adds ``scale * vector`` to a stage at every position.

    Args:
      stage: a name of ``stages.STAGES``.
      vector: as the stage's last axes.
      layer: the layer, or None for every layer and for stages outside the layers.
      scale: how much of it.

    Raises:
      ValueError: no such stage.
    """
    check_stage(stage)
    added = jnp.asarray(vector, jnp.float32) * scale
    return Intervention(stage, lambda value: value + added.astype(value.dtype), layer)


@own_settings()
def logit_gradient(
    runner: JaxRunner,
    token_ids: Sequence[int],
    *,
    token: int,
    stage: str,
    layer: int | None = None,
    position: int = -1,
) -> tuple[float, np.ndarray]:
    """A logit and its gradient with respect to an activation, through the packed weights.

    Args:
      runner: the jax backend.
      token_ids: the prompt, T tokens.
      token: the logit's token.
      stage: the activation, a name of ``stages.STAGES`` with float values.
      layer: its layer, or None outside the layers.
      position: of the logit.

    Returns:
      The logit and its gradient, float32 [T, ...] in the stage's shape.

    Raises:
      ValueError: the stage does not exist there, or the runner is of another backend.
    """
    if not isinstance(runner, JaxRunner):
        raise ValueError(f'the {runner.name} backend has no gradients: load(backend="jax") has')
    ids = np.asarray(token_ids, np.int32)
    _check_index("token", token, 0, runner.config.vocab_size)
    _check_index("position", position, -len(ids), len(ids))
    captured = runner.forward(ids, capture=(stage,)).stages
    if (stage, layer) not in captured or captured[stage, layer].dtype != np.float32:
        raise ValueError(
            f"there is no float stage {stage!r} at layer {layer}; see qwen3_moe_jax.core.stages.STAGES"
        )
    zero = jnp.zeros((1, *captured[stage, layer].shape), jnp.float32)
    cache = KVCache.create(runner.config, 1, len(ids))

    @jax.jit
    @jax.value_and_grad
    def logit(delta: jax.Array, params) -> jax.Array:
        model = runner.model.clone(interventions=(Intervention(stage, lambda x: x + delta, layer),))
        network = model.bind(params)
        output = network(jnp.asarray(ids[None]), cache, jnp.zeros(1, jnp.int32))
        return network.logits(output.hidden)[0, position, token]

    value, gradient = logit(zero, runner.params)
    return float(value), np.asarray(gradient[0])


def _check_index(name: str, value: int, minimum: int, end: int) -> None:
    """JAX takes the nearest of what is there for an index that is not, in silence."""
    check_number(name, value)
    if not minimum <= value < end:
        raise ValueError(f"{name} must be {minimum} to {end - 1}, not {value}")


def _without(logits: jax.Array, experts: tuple[int, ...]) -> jax.Array:
    _check_experts(experts, logits.shape[-1])
    return logits.at[..., jnp.asarray(experts)].set(-jnp.inf)


def _check_experts(experts: tuple[int, ...], count: int) -> None:
    """JAX leaves out an index that is not there, in silence."""
    for expert in experts:
        if not 0 <= expert < count:
            raise ValueError(f"there is no expert {expert}: this model has 0 to {count - 1}")


def _only(logits: jax.Array, experts: tuple[int, ...]) -> jax.Array:
    _check_experts(experts, logits.shape[-1])
    kept = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(experts)].set(True)
    return jnp.where(kept, logits, -jnp.inf)
