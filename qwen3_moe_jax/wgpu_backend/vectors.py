"""The kernels of one token, with what comes before and after a product joined to it.

Eight dispatches per layer: q, k and v of the normed residual; attention with head norms, RoPE and the
cache's write, and the join of its parts; o_proj with the residual; router of the normed residual; choice of
experts; gate, up and SwiGLU; down with the weighted sum and the residual.
"""

from collections.abc import Sequence
from typing import Any

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.wgpu_backend.adapter import Vectors
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.kernels import (
    DenseBuffer,
    ExpertBuffer,
    dense_words,
    nbytes_of,
    params_of,
    shared_lanes,
    stack_words,
)
from qwen3_moe_jax.wgpu_backend.sites import Site
from qwen3_moe_jax.wgpu_backend.weights import LayerBuffers

MAX_GROUP = 16
"""Most query heads of a KV head: each takes registers of every lane of attend.wgsl."""
HEAD_DIMS = (32, 64, 128, 256)
"""Those whose vectors divide the lanes of attend.wgsl."""
STAGED_COLUMNS = 32
"""Staged inputs are whole groups of so many columns."""
MAX_LANES = 256
"""Invocations of a workgroup that every adapter allows."""


def suits(device: Device, config: Qwen3MoeConfig, layers: Sequence[LayerBuffers]) -> bool:
    """Whether these kernels can compute a token of this model on this adapter."""
    vectors = device.tuning.vectors
    if vectors is None:
        return False
    group, rest = divmod(config.num_attention_heads, config.num_key_value_heads)
    shared = max(
        4 * (config.hidden_size + vectors.workgroup * (2 + 2 * vectors.rows)),
        _attention_bytes(group, config.head_dim, vectors.tile),
    )
    return (
        rest == 0
        and group <= MAX_GROUP
        and config.head_dim in HEAD_DIMS
        and config.hidden_size % STAGED_COLUMNS == 0
        and config.num_experts_per_tok * vectors.team <= MAX_LANES
        and shared <= device.shared_bytes
        and all(len(layer.down) == 1 for layer in layers)
    )


def _attention_bytes(group: int, head_dim: int, tile: int) -> int:
    """Shared memory of attend.wgsl."""
    return 4 * (group * head_dim + 5 * group * tile + 3 * group) + 20 * 4 * tile


def _settings(device: Device) -> Vectors:
    assert device.tuning.vectors is not None
    return device.tuning.vectors


def _constants(
    device: Device, lanes: int, rows: int, columns: int, workgroup: int, copies: int = 1
) -> dict[str, Any]:
    subgroup = _settings(device).subgroup if device.subgroups else 0
    vectors = columns // 4
    beside = 4 * workgroup * 2 * rows
    staged = columns % STAGED_COLUMNS == 0 and 16 * copies * vectors + beside <= device.shared_bytes
    return {
        "WG": workgroup,
        "LANES": min(lanes, subgroup or lanes),
        "ROWS": rows,
        "VECTORS": vectors,
        "SUBGROUP": subgroup,
        "STAGED": staged,
        "NORMED": False,
        "KEEPS": False,
        "ADDED": False,
        "DUAL": False,
        "CHOICES": copies,
    }


def dense_site(
    device: Device,
    weights: DenseBuffer,
    x: Any,
    y: Any,
    step: Any,
    *,
    norm: tuple[Any, Any] | None = None,
    keeps: bool = False,
    sums: Any = None,
    router: bool = False,
    eps: float = 0.0,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y = W x``; with ``sums``, ``y += W x``.

    Args:
      norm: the norm's weights, by which x is the residual stream, and where the normed input goes.
      keeps: it goes there without a trace, too.
      sums: where W x itself goes for a trace.
      router: few rows, one for each group of lanes.
    """
    v, segments = _settings(device), weights.segments
    columns = segments[0].columns
    types = sorted({s.type for s in segments})
    rows = 1 if router else v.rows
    workgroup = min(64, v.workgroup) if router else v.workgroup
    lanes = shared_lanes(types[0], columns, v.router_lanes if router else v.lanes)
    constants = _constants(device, lanes, rows, columns, workgroup)
    constants |= {"NORMED": norm is not None, "KEEPS": keeps, "ADDED": sums is not None}
    kernel = device.kernel("vector", MODE="dense", TYPES=[t.name for t in types], **constants)
    words, groups = dense_words(segments, workgroup // constants["LANES"] * rows)
    params = params_of(device, words, x_vectors=columns // 4, y_stride=0, segments=len(segments), eps=eps)
    resources = {0: params, 1: step, 2: weights.buffer, 3: x, 4: y}
    if norm is not None:
        resources |= {5: norm[0], 6: norm[1]}
    if sums is not None:
        resources[7] = sums
    return Site(device.bind(kernel, resources), groups, nbytes=nbytes_of(segments), taps=taps)


def expert_site(
    device: Device,
    pair: Sequence[ExpertBuffer],
    x: Any,
    y: Any,
    step: Any,
    ids: Any,
    *,
    plane: int,
    taps: tuple[Any, ...] = (),
) -> Site:
    """gate, up and SwiGLU of the chosen experts that these windows hold."""
    v, first = _settings(device), pair[0]
    rows = max(1, v.rows // 2)
    constants = _constants(
        device, shared_lanes(first.type, first.columns, v.lanes), rows, first.columns, v.workgroup
    )
    constants |= {"DUAL": True}
    kernel = device.kernel("vector", MODE="chosen", TYPES=[w.type.name for w in pair], **constants)
    params = params_of(
        device,
        stack_words(pair),
        x_vectors=first.columns // 4,
        y_stride=first.rows,
        experts=(first.begin, first.end),
        plane=plane,
        segments=len(pair),
    )
    resources = {0: params, 1: step, 2: first.buffer, 3: x, 4: y, 5: ids, 7: pair[1].buffer}
    per_group = v.workgroup // constants["LANES"] * rows
    groups = -(-first.rows // per_group)
    return Site(device.bind(kernel, resources), groups, "pairs", nbytes=nbytes_of(pair), taps=taps)


def down_site(
    device: Device,
    stack: ExpertBuffer,
    x: Any,
    y: Any,
    step: Any,
    buffers: dict[int, Any],
    *,
    chosen: int,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y += sum of weight * W[id] x[choice]``; ``buffers``: ids, weights, for a trace sums and products."""
    v = _settings(device)
    lanes = shared_lanes(stack.type, stack.columns, v.team_lanes)
    constants = _constants(device, lanes, v.team_rows, stack.columns, chosen * v.team, chosen)
    constants |= {"ADDED": True}
    kernel = device.kernel("vector", MODE="summed", TYPES=[stack.type.name], **constants)
    params = params_of(device, stack_words([stack]), x_vectors=stack.columns // 4, y_stride=0, segments=1)
    dispatch = device.bind(kernel, {0: params, 1: step, 2: stack.buffer, 3: x, 4: y, **buffers})
    per_group = v.team // constants["LANES"] * v.team_rows
    return Site(dispatch, -(-stack.rows // per_group), nbytes=chosen * nbytes_of([stack]), taps=taps)


def attention_sites(
    device: Device,
    step: Any,
    buffers: dict[int, Any],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    eps: float,
    f16: bool,
    taps: tuple[Any, ...] = (),
    joined_taps: tuple[Any, ...] = (),
) -> list[Site]:
    """Head norms, RoPE, cache write and attention; then the join of its parts.

    Args:
      buffers: qkv, norms, table, roped, keys, values as 2 to 7, output and parts as 9 and 10.
    """
    v = _settings(device)
    kernel = device.kernel(
        "attend",
        HEAD_DIM=head_dim,
        GROUP=heads // kv_heads,
        TILE=v.tile,
        TEAM=v.subgroup,
        SUBGROUPS=device.subgroups,
        KV_F16=f16,
    )
    params = device.uniform(heads, kv_heads, capacity, float(eps), float(head_dim**-0.5))
    attend = device.bind(kernel, {0: params, 1: step, **buffers})
    kernel = device.kernel("join", HEAD_DIM=head_dim, TILE=v.tile, MAX_PARTS=v.parts, WG=4 * v.tile)
    join = device.bind(kernel, {1: step, 2: buffers[10], 3: buffers[9]})
    return [
        Site(attend, kv_heads, spans=v.tile, max_spans=v.parts, taps=taps),
        Site(join, heads, spans=v.tile, max_spans=v.parts, merge=True, taps=joined_taps),
    ]
