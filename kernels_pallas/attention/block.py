"""What the thread blocks of both attention kernels share: which tile of rows each takes, and the softmax.

The recurrence is that of Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option

RESULT = plgpu.Layout.WGMMA
PER_ROW = RESULT.reduce(1)
_MASKED = -1e30


class Arrays(NamedTuple):
    """References to global memory, as ``kernel_sm90.attend_rows`` has them.

    Attributes:
      bounds: int32 [B, tiles, 2]; positions: int32 [B, rows].
      q, out: [B * K, rows, H].
      k, v: [L * C, S, K * H].
    """

    bounds: Any
    positions: Any
    q: Any
    k: Any
    v: Any
    out: Any


def launch(
    make_block: Callable[..., Any],
    config: Any,
    interpret: Any,
    *,
    batch: int,
    kv_heads: int,
    rows: int,
    head_dim: int,
    capacity: int,
    dtype: Any,
    scratch: Any,
    warpgroups: int,
    name: str,
) -> Any:
    """The compiled kernel's wrapper: (layer, slots, bounds, positions, q, k, v) -> [B * K, rows, H].

    Args:
      make_block: of the references (:class:`Arrays`, and those of ``scratch``), whether it is emulated, its
        tile, head and sequence; its ``run`` is what the thread block does.
      config: ``kernel_sm90.AttentionConfig``.
      interpret: None, or parameters of the interpreter.
      batch, kv_heads, rows, head_dim, capacity, dtype: of the arrays (``kernel_sm90.attend_rows``).
      scratch: a named tuple of shared memory and barriers.
      warpgroups: of a thread block.
      name: of the kernel.
    """
    tiles = rows // config.tile

    def body(layer, slots, bounds, positions, q, k, v, out, **buffers):
        item = lax.axis_index("item")
        # The last tiles see the most keys: they go first, so that none is left alone at the end.
        tile = tiles - 1 - lax.div(item, jnp.int32(batch * kv_heads))
        head = lax.rem(item, jnp.int32(batch * kv_heads))
        sequence = lax.div(head, jnp.int32(kv_heads))
        refs = Arrays(bounds, positions, q, k, v, out), type(scratch)(**buffers)
        block = make_block(config, *refs, interpret is not None, tile=tile, head=head, sequence=sequence)
        block.cache = layer[0] * capacity + slots[sequence]
        block.column = lax.rem(head, jnp.int32(kv_heads)) * head_dim
        block.run()

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * kv_heads, rows, head_dim), dtype),
        scratch_types=scratch._asdict(),
        grid=(tiles * batch * kv_heads,),
        grid_names=("item",),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=interpret is None,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **interpreter_option(interpret, warpgroups),
    )


def fill(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    """float32 in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def share_of(position: Any, total: Any) -> Any:
    """What each row's sum is multiplied by at the end.

    A row that sees nothing (padding) has a sum of masked weights, or none: its result is zero.
    """
    return jnp.where(position >= 0, 1 / jnp.maximum(total, 1e-30), 0.0)


def weights_of(
    score: Any, position: Any, number: Any, head_dim: int, peak: Any, total: Any, *, masked: bool
) -> tuple[Any, Any, Any, Any]:
    """A tile of keys in the running softmax.

    Args:
      score: float32 [64, keys], products of queries and keys.
      position: int32 [64]; a row sees the keys up to its own.
      number: of the tile, int32.
      head_dim: H.
      peak, total: float32 [64], of the tiles before.
      masked: whether some row does not see all keys.

    Returns:
      Weights [64, keys]; what earlier results are multiplied by [64]; the new peak and total.
    """
    score = score * (math.log2(math.e) * head_dim**-0.5)
    if masked:
        key = plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=RESULT) + number * score.shape[1]
        visible = key <= lax.broadcast_in_dim(position, score.shape, [0])
        score = jnp.where(visible, score, _MASKED)
    new_peak = jnp.maximum(peak, score.max(axis=1))
    weights = jnp.exp2(score - lax.broadcast_in_dim(new_peak, score.shape, [0]))
    shrink = jnp.exp2(peak - new_peak)
    return weights, shrink, new_peak, total * shrink + weights.sum(axis=1)
