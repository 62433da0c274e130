"""The ways in which a token of each sequence is written, best first, and the choice between them.

``choose`` asks each way once, when weights are loaded, whether this model, these weights and this
device suit it. A ``Decoder`` holds the network and the ways that are left: it is static in jitted
programs, and while one is traced it takes the first way that has no reason against this batch, this
cache and what is to be seen. Generation, batches, ``describe`` and scripts all ask it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, Params, Types, abstract_params, tiled_params
from qwen3_moe_jax.jax_backend.qwen3_moe import OUTSIDE_LAYERS, Output, Qwen3Moe
from qwen3_moe_jax.jax_backend.sharding import Shards
from qwen3_moe_jax.jax_backend.trees import tree_dataclass
from qwen3_moe_jax.kernels_pallas.decode_layers import api as decode_layers
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Split
from qwen3_moe_jax.kernels_pallas.gpu import device as gpu
from qwen3_moe_jax.kernels_pallas.implementations import ANY

if TYPE_CHECKING:
    from qwen3_moe_jax.jax_backend.model import Network
    from qwen3_moe_jax.jax_backend.sharded_network import ShardedNetwork


@tree_dataclass
class Step:
    """What the network says about T tokens of each sequence.

    Attributes:
      logits: float32 [B, T, V].
      cache: with these tokens.
      expert_ids: int32 [L, B, T, X].
      stages: those that the model captures, those of layers with L first.
    """

    logits: jax.Array
    cache: KVCache
    expert_ids: jax.Array
    stages: dict[str, jax.Array]


class DecodePath(Protocol):
    """A way to write one token of each of several sequences.

    Attributes:
      name: for people.
      batches: the numbers of sequences that it is for.
      is_one_launch: whether a step is one launch, so that loops of steps need not wait for the host.
    """

    name: ClassVar[str]
    batches: ClassVar[range]
    is_one_launch: ClassVar[bool]

    def reason_on(self, device: Device, model: Qwen3Moe, params: Params) -> str | None:
        """Why this device does not suit it, or None; asked when weights are loaded."""
        ...

    def reason_against(
        self, model: Qwen3Moe, params: Params, batch: int, cache: KVCache, is_forced: bool = False
    ) -> str | None:
        """Why it does not take this, or None; asked while a program is traced.

        Args:
          model: its config and compute dtype, what it captures and changes.
          params: their types and layouts.
          batch: sequences.
          cache: its dtype and shape.
          is_forced: experts are given.
        """
        ...

    def step(
        self,
        model: Qwen3Moe,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
        active: jax.Array | None = None,
    ) -> Step:
        """Writes one token of every sequence.

        Args:
          token_ids: int32 [B, 1].
          start: int32 [B], its position.
          expert_ids: int32 [L, B, 1, X] to force the routing, or None.
          active: bool [B], whose results are wanted, or None for all: the others' may be anything.
        """
        ...


def read(
    model: Qwen3Moe,
    params: Params,
    token_ids: jax.Array,
    start: jax.Array | Sequence[Span],
    cache: KVCache,
    expert_ids: jax.Array | None = None,
    layers: Callable[..., Output] | None = None,
) -> Step:
    """T tokens of each sequence [B, T] through the network, all of their logits.

    Args:
      layers: what runs the layers of a bound network; None is the network's own loop.
    """

    def run(network: "Network | ShardedNetwork") -> tuple[jax.Array, Output]:
        layered = network if layers is None else network.through(layers)
        output = layered(token_ids, cache, start, expert_ids)
        return network.logits(output.hidden), output

    (logits, output), stages = model.bind(params).watched(run)
    return Step(logits, output.cache, output.expert_ids, stages)


def _changed_stages(model: Qwen3Moe) -> set[str]:
    return {intervention.stage for intervention in model.interventions}


@dataclass(frozen=True)
class LayerByLayer:
    """The network as it is defined, operation after operation: takes everything."""

    name: ClassVar[str] = "layer by layer"
    batches: ClassVar[range] = range(1, 1 << 31)
    is_one_launch: ClassVar[bool] = False

    def reason_on(self, device: Device, model: Qwen3Moe, params: Params) -> str | None:
        return None

    def reason_against(
        self, model: Qwen3Moe, params: Params, batch: int, cache: KVCache, is_forced: bool = False
    ) -> str | None:
        return None

    def step(
        self,
        model: Qwen3Moe,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
        active: jax.Array | None = None,
    ) -> Step:
        begins = start if active is None else [Span(start, 1, ends=start + active)]
        return read(model, params, token_ids, begins, cache, expert_ids)


@dataclass(frozen=True)
class FewLaunches:
    """All layers as one operation of few launches each: for batches that one kernel does not hold."""

    name: ClassVar[str] = "few launches per layer"
    batches: ClassVar[range] = range(17, 65)
    is_one_launch: ClassVar[bool] = False

    def reason_on(self, device: Device, model: Qwen3Moe, params: Params) -> str | None:
        if model.kernels == "portable":
            return _refusal(gpu.require_ampere)
        if model.kernels not in ("hopper", ANY):
            return f"it is made of GPU kernels, and {model.kernels} is chosen"
        return _refusal(gpu.require_hopper)

    def reason_against(
        self, model: Qwen3Moe, params: Params, batch: int, cache: KVCache, is_forced: bool = False
    ) -> str | None:
        if is_forced or model.layers is not None:
            return "it chooses its experts itself, in all layers"
        if seen := (_changed_stages(model) - {"ffn_moe_logits"} | model.capture) - OUTSIDE_LAYERS:
            return f"it does not show or change {', '.join(sorted(seen))}"
        if jnp.dtype(model.compute_dtype) != jnp.bfloat16:
            return f"it multiplies operands of 16 bits, and compute_dtype is {jnp.dtype(model.compute_dtype)}"
        if cache.scales is not None:
            return "it reads a KV cache of 16 bits, and it is int8"
        return decode_layers.reason_against(params["layers"], batch, cache.k, _named(model))

    def step(
        self,
        model: Qwen3Moe,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
        active: jax.Array | None = None,
    ) -> Step:
        layers = lambda network, ids, cache, start, _: few_launches(network, ids, cache, Span(start, 1))
        return read(model, params, token_ids, start, cache, layers=layers)


def few_launches(network: "Network", token_ids: jax.Array, cache: KVCache, span: Span) -> Output:
    """All layers for one token of each sequence [B, 1]."""
    model = network.settings
    x, rope = network.embed(token_ids, [span])
    change = lambda logits, layer: network.stage("ffn_moe_logits", logits[:, None], layer)[:, 0]
    hidden, k, v, chosen = ops.decode_layers(
        x[:, 0],
        network.layers,
        cache.k,
        cache.v,
        span.start,
        span.slots,
        (rope[0][:, 0], rope[1][:, 0]),
        num_experts_per_tok=model.config.num_experts_per_tok,
        eps=model.config.rms_norm_eps,
        on_logits=change if "ffn_moe_logits" in _changed_stages(model) else None,
        kernels=_named(model),
        mesh=_split(model),
        by_stores=_adds_by_stores(model),
    )
    return Output(hidden[:, None], replace(cache, k=k, v=v), chosen[:, :, None])


@dataclass(frozen=True)
class OneKernel:
    """A whole token as one kernel (``ops.decode_step``): a batch does not change a sequence's bits."""

    name: ClassVar[str] = "one kernel"
    batches: ClassVar[range] = range(1, 17)
    is_one_launch: ClassVar[bool] = True

    def reason_on(self, device: Device, model: Qwen3Moe, params: Params) -> str | None:
        if model.shards is not None:
            if reason := model.shards.reason_against_stores:
                return reason
            if model.kernels == "portable":
                return "over several GPUs it has passed with Hopper's kernels alone, and portable is chosen"
        if model.kernels == "xla":
            return "it is a GPU kernel, and xla is chosen"
        if device.platform != "gpu":  # said without the import of Mosaic GPU, which takes half a second
            return f"it needs an NVIDIA GPU, and this is {device.platform}"
        return _refusal(lambda: _decode_step().check_device(device)) or _refusal(
            lambda: _decode_step().check(model.config, params, 1, device, _named(model), _split(model))
        )

    def reason_against(
        self, model: Qwen3Moe, params: Params, batch: int, cache: KVCache, is_forced: bool = False
    ) -> str | None:
        if model.layers is not None or model.capture or model.interventions:
            return "it shows and changes no stages, and runs all layers"
        if jnp.dtype(model.compute_dtype) != jnp.bfloat16:
            return f"it multiplies operands of 16 bits, and compute_dtype is {jnp.dtype(model.compute_dtype)}"
        if cache.k.dtype not in (jnp.bfloat16, jnp.float16, jnp.int8):
            return f"it reads a KV cache of 16 bits or int8, and it is {cache.k.dtype}"
        if model.shards is not None and cache.scales is not None:
            return "over several GPUs it has not run with a KV cache of int8"
        if batch not in self.batches:
            return f"it is for {self.batches[0]} to {self.batches[-1]} sequences, not {batch}"
        return _refusal(lambda: _decode_step().check(model.config, params, batch, mesh=_split(model)))

    def step(
        self,
        model: Qwen3Moe,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
        active: jax.Array | None = None,
    ) -> Step:
        api, config = _decode_step(), model.config
        run: Callable[..., Any] = partial(api.decode_step, kernels=_named(model), mesh=_split(model))
        if model.shards is not None:
            from qwen3_moe_jax.jax_backend.sharded_network import on_all_devices

            run = partial(on_all_devices, run, model.shards)
        forced = None if expert_ids is None else expert_ids[:, :, 0]
        args = (params, config, token_ids[:, 0], start, cache.k, cache.v)
        logits, k, v, chosen, scales = run(*args, scales=cache.scales, expert_ids=forced, active=active)
        return Step(logits[:, None], _replaced(cache, k, v, scales), chosen[:, :, None], {})

    def consecutive(
        self, model: Qwen3Moe, params: Params, token_ids: jax.Array, start: jax.Array, cache: KVCache
    ) -> Step:
        """T tokens of one sequence, int32 [1, T] from position ``start`` [1] on, as rows of one kernel."""
        positions = start + jnp.arange(token_ids.shape[1])
        args = (params, model.config, token_ids[0], positions, cache.k, cache.v)
        options = {"scales": cache.scales, "one_sequence": True, "kernels": _named(model)}
        out = _decode_step().decode_step(*args, **options)
        cache = _replaced(cache, out.k, out.v, out.scales)
        return Step(out.logits[None], cache, out.expert_ids[:, None], {})


def _replaced(
    cache: KVCache, k: jax.Array, v: jax.Array, scales: tuple[jax.Array, jax.Array] | None
) -> KVCache:
    """The cache with what a kernel has left of it; ``scales``: of int8."""
    k_scale, v_scale = scales or (None, None)
    return replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _split(model: Qwen3Moe) -> Split:
    """How the model is split over devices."""
    return ONE_DEVICE if model.shards is None else Split(model.shards.shape.ep, model.shards.shape.tp)


def _adds_by_stores(model: Qwen3Moe) -> bool:
    """Whether sums over devices are taken by kernels that write into the memory of all."""
    if model.shards is None or model.kernels != "hopper":
        return False
    return model.shards.reason_against_stores is None


def _named(model: Qwen3Moe) -> str | None:
    """The decode kernel's primitives that are chosen, or None."""
    return None if model.kernels == ANY else model.kernels


def _decode_step() -> ModuleType:
    return gpu.import_kernels("decode_step.api")


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except NotImplementedError as error:
        return str(error)
    return None


PATHS: tuple[DecodePath, ...] = (OneKernel(), FewLaunches(), LayerByLayer())
"""All ways, best first; the last takes everything."""


@dataclass(frozen=True)
class Decoder:
    """The network and the ways in which it writes a token; hashable, static in jitted programs.

    Attributes:
      model: the network.
      paths: best first; the last takes everything.
      refused: of each way that was left out when weights were loaded, its name and the reason.
    """

    model: Qwen3Moe
    paths: tuple[DecodePath, ...] = (LayerByLayer(),)
    refused: tuple[tuple[str, str], ...] = ()

    def path(self, params: Params, batch: int, cache: KVCache, is_forced: bool = False) -> DecodePath:
        """The first way without a reason against it."""
        return next(
            path
            for path in self.paths
            if path.reason_against(self.model, params, batch, cache, is_forced) is None
        )

    def step(
        self,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
        active: jax.Array | None = None,
    ) -> Step:
        """One token of each sequence, see :meth:`DecodePath.step`."""
        path = self.path(params, len(token_ids), cache, expert_ids is not None)
        return path.step(self.model, params, token_ids, start, cache, expert_ids, active)

    def read(
        self,
        params: Params,
        token_ids: jax.Array,
        start: jax.Array,
        cache: KVCache,
        expert_ids: jax.Array | None = None,
    ) -> Step:
        """T tokens of each sequence [B, T], as :func:`read`; one token each is a step of decoding."""
        if token_ids.shape[1] > 1:
            return read(self.model, params, token_ids, start, cache, expert_ids)
        return self.step(params, token_ids, start, cache, expert_ids)

    @property
    def shards(self) -> Shards | None:
        """The devices that the network is split over, or None."""
        return self.model.shards

    @property
    def has_kernel(self) -> bool:
        """Whether few sequences are written by one kernel: a GPU's."""
        return self.paths[0].is_one_launch

    def is_one_launch(self, rows: int) -> bool:
        """Whether tokens of so many sequences are one launch, without captured stages or forced experts.

        As ``path(...).is_one_launch``, but no kernel is asked again, nor imported.
        """
        return any(path.is_one_launch and rows in path.batches for path in self.paths)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether few sequences at a time give the bits of each alone."""
        return self.has_kernel

    def clone(self, **settings: Any) -> "Decoder":
        """The same with other settings of the network."""
        return replace(self, model=self.model.clone(**settings))

    def describe(self) -> dict[str, str]:
        """Of each way, the sequences that it is for, or why it is left out."""
        found = dict(self.refused)
        for path in self.paths:
            first, last = path.batches[0], path.batches[-1]
            found[path.name] = f"{first} to {last} sequences" if last < 1 << 16 else "everything else"
        return {path.name: found[path.name] for path in PATHS if path.name in found}


def choose(model: Qwen3Moe, params: Params, device: Device, cache_dtype: Any) -> Decoder:
    """The ways that this device, these weights and this dtype of the KV cache leave.

    Args:
      params: arrays, or their shapes.
    """
    left: list[DecodePath] = []
    refused: list[tuple[str, str]] = []
    for path in PATHS:
        batch = path.batches[0]
        cache = jax.eval_shape(lambda n=batch: KVCache.create(model.config, n, ops.CACHE_TILE, cache_dtype))
        reason = path.reason_on(device, model, params) or path.reason_against(model, params, batch, cache)
        if reason is None:
            left.append(path)
        else:
            refused.append((path.name, reason))
    return Decoder(model, tuple(left), tuple(refused))


def plan_decoding(config: Qwen3MoeConfig, types: Types, device: Device, kernels: str = ANY) -> Decoder:
    """The ways that this model would have on a GPU with a runner's own dtypes; loads nothing."""
    params = tiled_params(abstract_params(config, types, GPU_ROLES))
    model = Qwen3Moe(config, jnp.dtype(jnp.bfloat16), kernels=kernels)
    return choose(model, params, device, jnp.float16)
