"""What a program of the network depends on besides its weights: settings, hashable, without Flax."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.sharding import Shards
from qwen3_moe_jax.jax_backend.trees import tree_dataclass
from qwen3_moe_jax.kernels_pallas import implementations

if TYPE_CHECKING:
    from qwen3_moe_jax.jax_backend.model import Network
    from qwen3_moe_jax.jax_backend.sharded_network import ShardedNetwork

OUTSIDE_LAYERS = frozenset({"inp_embd", "result_norm", "result_output"})
"""Stages that no layer has."""


@dataclass(frozen=True)
class Intervention:
    """A change of one stage's value inside the jitted model.

    Attributes:
      stage: name of the stage.
      change: maps the stage's value to another of the same shape; axes as in
        ``stages.STAGES`` with B before T.
      layer: the layer, or None for every layer and for stages outside the layers.
    """

    stage: str
    change: Callable[[jax.Array], jax.Array]
    layer: int | None = None


@tree_dataclass
class Output:
    """Result of the decoder layers.

    Attributes:
      hidden: float32 [B, T, D], after the last layer and before the final norm.
      cache: the cache with T more positions.
      expert_ids: int32 [L, B, T, X].
    """

    hidden: jax.Array
    cache: KVCache
    expert_ids: jax.Array


@dataclass(frozen=True)
class Qwen3Moe:
    """The network without its weights: hashable, a static argument of jitted programs.

    Attributes:
      config: hyper-parameters.
      compute_dtype: operands of the matrix products; accumulation is float32.
      interventions: changes of stages, in the order in which they are applied.
      capture: stages to show; those inside the fused operations make them unfused.
      layers: the layers to run, or None for all.
      kernels: "hopper", "portable", "native" or "xla", which the operations take; "any" leaves it to them.
      shards: the devices that it is split over, or None.
    """

    config: Qwen3MoeConfig
    compute_dtype: Any = jnp.float32
    interventions: tuple[Intervention, ...] = ()
    capture: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None
    kernels: str = implementations.ANY
    shards: Shards | None = None

    def bind(self, params: Mapping[str, Any]) -> "Network | ShardedNetwork":
        """The network with these weights (``params.load_params``, ``sharded_params.load_sharded``)."""
        if self.shards is not None:
            from qwen3_moe_jax.jax_backend.sharded_network import ShardedNetwork

            return ShardedNetwork(self, self.shards, params)
        from qwen3_moe_jax.jax_backend.model import Network  # Flax: where programs are traced alone

        return Network(params, self)

    def clone(self, **settings: Any) -> "Qwen3Moe":
        """The same with other settings."""
        return replace(self, **settings)
