"""all_layers: every decoder layer for some tokens of any sequences, in one call on the CPU."""

from typing import NamedTuple

import jax

from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.all_layers import native
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable


class Layers(NamedTuple):
    """Attributes:
    hidden: float32 [R, D], after the last layer.
    k: float32 [L, C, S, K, H], with the tokens' keys; ``v`` the same of values.
    expert_ids: int32 [L, R, X].
    """

    hidden: jax.Array
    k: jax.Array
    v: jax.Array
    expert_ids: jax.Array


def reason_against(layers: LayerTable, k_cache: jax.Array) -> str | None:
    """Why these weights and this cache do not run here, or None. Arrays may be their shapes."""
    try:
        native.check(layers, k_cache)
    except NotImplementedError as error:
        return str(error)
    return None


def all_layers(
    x: jax.Array,
    layers: LayerTable,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    *,
    num_experts_per_tok: int,
    eps: float,
    expert_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> Layers:
    """Runs tokens through all layers, each attending to its own sequence's row of the cache.

    Keys and values of all tokens are written before any is read, in the order of the tokens: of two with
    one place the later one's stay. A token's results do not depend on the others beside it, but for what
    these write to its sequence.

    Args:
      x: float32 [R, D].
      layers: the weights.
      k_cache, v_cache: float32 [L, C, S, K, H].
      slots: int32 [R], the row of the cache of each token's sequence.
      positions: int32 [R], in [0, S); what is after them in the cache is not read. A negative one is that
        of padding: nothing is computed for it or written; its hidden row and its experts are 0.
      rope: cos and sin, float32 [R, H / 2] each.
      num_experts_per_tok: X.
      eps: of the norms.
      expert_ids: int32 [L, R, X], R in any shape, to force the choice; or None.
      implementation: None or "native", the only one.

    Raises:
      NotImplementedError: it does not run here; says why.
    """
    candidates = {"native": native.all_layers}
    with implementations.using(implementations.NATIVE):
        results = implementations.run(
            "all_layers",
            implementation,
            candidates,
            x,
            layers,
            k_cache,
            v_cache,
            slots,
            positions,
            rope,
            num_experts_per_tok,
            eps,
            expert_ids,
        )
    return Layers(*results)
