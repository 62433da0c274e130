"""The network over the devices of a mesh: the calls of ``Network``, its results but for the order of sums.

Each device runs the network on its part of the weights inside ``jax.shard_map``; the sums of all parts are
taken where ``model`` says ``summed``. What comes out is whole and the same on every device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.stages import LAYER_STAGES, OUTPUT_STAGES
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.model import Network
from qwen3_moe_jax.jax_backend.qwen3_moe import Output, Qwen3Moe
from qwen3_moe_jax.jax_backend.sharding import CACHE_SPEC, STAGE_AXES, Shards

R = TypeVar("R")

_IN_LAYERS = frozenset(stage.name for stage in LAYER_STAGES)
_OF_HEAD = frozenset(stage.name for stage in OUTPUT_STAGES)


class ShardedNetwork:
    """As ``Network``, of weights that are split over the devices of a mesh."""

    def __init__(self, model: Qwen3Moe, shards: Shards, params: Mapping[str, Any]):
        """Takes the parameters of all devices (``sharded_params.load_sharded``).

        Raises:
          OptionError: an intervention changes a stage of which each device has a part.
        """
        split = {i.stage for i in model.interventions} & {*STAGE_AXES, "ffn_moe_down"}
        if split:
            raise OptionError(
                f"{', '.join(sorted(split))}: each device of a mesh has a part: change it without mesh"
            )
        self.settings, self._shards, self._params = model, shards, params
        self._shown: dict[str, jax.Array] = {}

    def __call__(
        self,
        token_ids: jax.Array,
        cache: KVCache,
        begins: jax.Array | Sequence[Span],
        expert_ids: jax.Array | None = None,
    ) -> Output:
        """As ``Network``; the cache is split by head."""
        run = self.through(lambda network, *args: network(*args))
        return run(token_ids, cache, begins, expert_ids)

    def through(self, layers: Callable[..., Output]) -> Callable[..., Output]:
        """As ``Network.through``: ``layers`` gets the network of each device."""
        return partial(self._through, layers)

    def _through(
        self,
        layers: Callable[..., Output],
        token_ids: jax.Array,
        cache: KVCache,
        begins: jax.Array | Sequence[Span],
        expert_ids: jax.Array | None,
    ) -> Output:
        specs: Any = jax.tree.map(lambda _: P(), Output(token_ids, cache, token_ids))
        specs = replace(specs, cache=jax.tree.map(lambda _: CACHE_SPEC, cache))
        args = ((token_ids, P()), (cache, CACHE_SPEC), (begins, P()), (expert_ids, P()))
        return self._run(layers, args, specs, self.settings.capture - _OF_HEAD)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """As ``Network.logits``."""

        def run(network: Network, hidden: jax.Array) -> jax.Array:
            return network.logits(hidden)

        return self._run(run, ((hidden, P()),), P(), self.settings.capture & _OF_HEAD)

    def watched(self, run: Callable[..., R], *args: Any) -> tuple[R, dict[str, jax.Array]]:
        """As ``Network.watched``: whole stages."""
        self._shown = {}
        return run(self, *args), self._shown

    def _run(
        self,
        f: Callable[..., Any],
        args: Sequence[tuple[Any, Any]],
        specs: Any,
        stages: frozenset[str],
    ) -> Any:
        """``f`` of each device's network and its parts of the arguments, which come with their specs.

        Args:
          stages: those that it shows.
        """

        def on_device(params: Any, *args: Any) -> Any:
            return Network(params, self.settings).watched(f, *args)

        shards, params = self._shards, self._params
        shown_specs = {name: shards.stage_spec(name, name in _IN_LAYERS) for name in stages}
        run = jax.shard_map(
            on_device,
            mesh=shards.mesh,
            in_specs=(shards.param_specs(params), *(spec for _, spec in args)),
            out_specs=(specs, shown_specs),
            check_vma=False,  # loops and custom derivatives in the ops have no rule for it
        )
        result, shown = run(params, *(value for value, _ in args))
        self._shown |= {name: self._once(name, value) for name, value in shown.items()}
        return result

    def _once(self, name: str, value: jax.Array) -> jax.Array:
        """A stage with each KV head once, where several devices have the same one."""
        if STAGE_AXES.get(name, (0, ""))[1] != "kv_heads":
            return value
        heads = self.settings.config.num_key_value_heads
        return value[..., :: self._shards.cache_heads // heads, :]


def on_all_devices(
    step: Callable[..., Any],
    shards: Shards,
    params: Mapping[str, Any],
    config: Qwen3MoeConfig,
    token_ids: jax.Array,
    start: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scales: tuple[jax.Array, jax.Array] | None,
    expert_ids: jax.Array | None,
    active: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """``decode_step`` on each device's part of the parameters and of the cache: its results.

    Args:
      step: ``decode_step.api.decode_step`` of the mesh; the other arguments are as its own.
    """

    def on_device(params: Any, ids: Any, start: Any, cache: Any, experts: Any, active: Any) -> Any:
        k, v, scales = cache
        out = step(params, config, ids, start, k, v, scales=scales, expert_ids=experts, active=active)
        return tuple(out)

    run = jax.shard_map(
        on_device,
        mesh=shards.mesh,
        in_specs=(shards.param_specs(params), P(), P(), CACHE_SPEC, P(), P()),
        out_specs=(P(), CACHE_SPEC, CACHE_SPEC, P(), CACHE_SPEC),
        check_vma=False,  # a kernel has no rule for it
    )
    return run(params, token_ids, start, (k, v, scales), expert_ids, active)
