"""decode_layers: one token of each of many sequences through all decoder layers.

The same as the operations of ``kernels_pallas`` one after the other, for a step that writes a token of
each of 17 to 64 sequences. There a layer's weights are read in less time than dozens of launches
between its products take, so the layers are a unit with kernels of their own.
"""

from collections.abc import Callable

import jax

from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Split
from qwen3_moe_jax.kernels_pallas.gpu.device import import_kernels, require_ampere, require_hopper
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable

_KERNELS = "decode_layers.kernel_sm90"


def _chosen(kernels: str | None) -> str:
    """The set that is named and runs on this device, or else the fastest that does.

    Raises:
      NotImplementedError: there is none.
    """
    if kernels == "portable":
        require_ampere()
        return kernels
    try:
        require_hopper()
        return "hopper"
    except NotImplementedError:
        if kernels is not None:
            raise
    require_ampere()
    return "portable"


def reason_against(table: LayerTable, batch: int, cache: jax.Array, kernels: str | None = None) -> str | None:
    """Why :func:`decode_layers` does not take these weights, this many sequences or this cache; or None."""
    try:
        name = _chosen(kernels)
        module = import_kernels(_KERNELS)
        module.check(table, batch, cache, kernels=module.BY_NAME[name])
    except NotImplementedError as error:
        return str(error)
    return None


def decode_layers(
    x: jax.Array,
    table: LayerTable,
    cache_k: jax.Array,
    cache_v: jax.Array,
    positions: jax.Array,
    slots: jax.Array | None,
    rope: tuple[jax.Array, jax.Array],
    *,
    num_experts_per_tok: int,
    eps: float,
    on_logits: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    kernels: str | None = None,
    mesh: Split = ONE_DEVICE,
    by_stores: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs one token of each sequence through the layers. bfloat16 precision or better throughout.

    Args:
      x: float32 [B, D], B from 17 to 64: the tokens' embeddings.
      table: of all layers, whose tensors have Hugging Face's names.
      cache_k: bfloat16 or float16 [L, C, S, K, H]; written in place where it is donated, as cache_v.
      cache_v: as cache_k.
      positions: int32 [B], at most S - 1.
      slots: int32 [B], the caches' row of each sequence; None is row b for sequence b.
      rope: cos and sin of the positions, float32 [B, H / 2] (``norm_rope.rope_tables``).
      num_experts_per_tok: X.
      eps: of the norms.
      on_logits: changes the router's logits, float32 [B, E], of the layer, an int32 scalar.
      kernels: "hopper" or "portable"; None is the fastest that the device runs.
      mesh: how the model is split, inside ``jax.shard_map`` over ``exchange.DEVICE_AXES``: the table and the
        caches are this device's parts then, and x and the results the same on all devices.
      by_stores: sums over devices need no collective of XLA: all are Hopper GPUs of this process, and each
        can write into the memory of the others.

    Returns:
      x after the last layer, both caches, and the chosen experts int32 [L, B, X].

    Raises:
      NotImplementedError: :func:`reason_against` says why.
    """
    name = _chosen(kernels)
    implementations.note("decode_layers", name, table.stacks.values())
    module = import_kernels(_KERNELS)
    return module.decode_layers(
        x,
        table,
        cache_k,
        cache_v,
        positions,
        slots,
        rope,
        num_experts_per_tok=num_experts_per_tok,
        eps=eps,
        on_logits=on_logits,
        kernels=module.BY_NAME[name],
        mesh=mesh,
        by_stores=by_stores,
    )
