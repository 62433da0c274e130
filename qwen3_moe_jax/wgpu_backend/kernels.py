"""Every kernel with its parameters: what to bind, and how large its grid is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.wgpu_backend import tiles as tiling
from qwen3_moe_jax.wgpu_backend.device import Device, Dispatch
from qwen3_moe_jax.wgpu_backend.layout import WORD_FORMATS, device_nbytes
from qwen3_moe_jax.wgpu_backend.sites import Site

ATTENTION_TILE = 128
GROUP_WORDS = 3
"""Of shared memory for each expert in group.wgsl, beside one for each of its lanes."""
ROUTER_LANES = 64
"""Invocations that choose the experts of a token: each walks over the maxima of all."""
FULL_LANES = 0.75
"""Lanes are halved until at least this share of them has work."""


@dataclass(frozen=True)
class Segment:
    """One matrix [rows, columns] in a buffer, at vec4 ``base``; its results start at column ``y_begin``."""

    type: GGMLType
    rows: int
    columns: int
    base: int = 0
    y_begin: int = 0


@dataclass(frozen=True, eq=False)
class DenseBuffer:
    """Up to three matrices with the same columns in one buffer: one dispatch."""

    buffer: Any
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class ExpertBuffer:
    """Experts ``begin`` to ``end`` of a stack [E, rows, columns]."""

    buffer: Any
    type: GGMLType
    begin: int
    end: int
    rows: int
    columns: int


def shared_lanes(type: GGMLType, columns: int, maximum: int) -> int:
    """Lanes that share a row: as many as keep busy."""
    units, lanes = columns // WORD_FORMATS[type].unit, maximum
    while lanes > 1 and units < FULL_LANES * lanes * -(-units // lanes):
        lanes //= 2
    return lanes


def _matmul_constants(device: Device, type: GGMLType, columns: int, tokens: int) -> dict[str, Any]:
    tuning = device.tuning
    rows = tuning.decode_rows if tokens == 1 else tuning.prefill_rows
    lanes = shared_lanes(type, columns, tuning.lanes)
    return {
        "WG": tuning.workgroup,
        "LANES": lanes,
        "ROWS": rows,
        "TOKENS": tokens,
        "SUBGROUPS": device.subgroups,
    }


def segment_words(segment: Segment, group_begin: int, expert_rows: int = 0) -> list[int]:
    """``Segment`` of products.wgsl."""
    layout = WORD_FORMATS[segment.type]
    row_blocks = segment.columns // layout.block
    return [
        layout.kind,
        segment.rows,
        group_begin,
        segment.y_begin,
        segment.base,
        row_blocks,
        segment.columns // layout.unit,
        expert_rows * row_blocks,
    ]


def params_of(
    device: Device,
    words: Sequence[int],
    *,
    x_vectors: int,
    y_stride: int,
    segments: int,
    head: bool = False,
    x_div: int = 1,
    experts: tuple[int, int] = (0, 0),
    plane: int = 0,
    eps: float = 0.0,
) -> Any:
    """``Params`` of products.wgsl."""
    own = (x_vectors, y_stride, int(head), x_div, *experts, plane, segments, float(eps), 0, 0, 0)
    return device.uniform(*own, *words, *[0] * (24 - len(words)))


def dense_words(segments: Sequence[Segment], rows_a_group: int) -> tuple[list[int], int]:
    """The words of matrices whose workgroups follow each other, and how many workgroups these are."""
    words: list[int] = []
    groups = 0
    for segment in segments:
        words += segment_words(segment, groups)
        groups += -(-segment.rows // rows_a_group)
    return words, groups


def stack_words(stacks: Sequence[ExpertBuffer]) -> list[int]:
    """The words of stacks of experts that a workgroup reads side by side."""
    return [word for s in stacks for word in segment_words(Segment(s.type, s.rows, s.columns), 0, s.rows)]


def nbytes_of(matrices: Sequence[Segment] | Sequence[ExpertBuffer]) -> int:
    """Bytes on the device of matrices, or of one expert of each stack."""
    return sum(device_nbytes(m.type, m.rows * m.columns) for m in matrices)


def dense_site(
    device: Device,
    weights: DenseBuffer,
    x: Any,
    y: Any,
    step: Any,
    *,
    tokens: int,
    y_stride: int,
    rounded: Any = None,
    head: bool = False,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y[t] = W x[t]``; ``tokens`` a tile, ``head`` starts at the step's head_row.

    Args:
      rounded: x after ``tiles.rounding_site``, for the kernel that reads it.
    """
    segments = weights.segments
    columns = segments[0].columns
    types = sorted({s.type for s in segments})
    tiles = device.tuning.tiles
    name, block = tiling.dense_kernel(tiles, segments, wide=bool(tiles and tokens == tiles.tokens))
    if block:
        constants, rows_a_group, tokens = tiling.constants(block), block.rows, block.tokens
    else:
        tokens = 1 if tokens == 1 else device.tuning.prefill_tokens
        constants = _matmul_constants(device, segments[0].type, columns, tokens)
        rows_a_group = constants["WG"] // constants["LANES"] * constants["ROWS"]
    kernel = device.kernel(name, MODE="dense", DUAL=False, TYPES=[t.name for t in types], **constants)
    words, groups = dense_words(segments, rows_a_group)
    params = params_of(
        device,
        words,
        x_vectors=tiling.vectors_of_row(name, columns),
        y_stride=y_stride,
        head=head,
        segments=len(segments),
    )
    inputs = rounded if name == "tile_bytes" else x
    dispatch = device.bind(kernel, {0: params, 1: step, 2: weights.buffer, 3: inputs, 4: y})
    follows = "once" if tokens == 1 else "head tiles" if head else "token tiles"
    return Site(dispatch, groups, follows, tokens, nbytes=nbytes_of(segments), taps=taps)


def expert_site(
    device: Device,
    weights: Sequence[ExpertBuffer],
    x: Any,
    y: Any,
    step: Any,
    routing: dict[str, Any],
    *,
    tokens: int,
    x_div: int,
    rounded: Any = None,
    plane: int = 0,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y[pair] = W[expert of pair] x[pair / x_div]``, or with two stacks (gate, up) their SwiGLU.

    Args:
      routing: buffers "ids", and for tiles of tokens "tiles" and "order".
      rounded: x after ``tiles.rounding_site``, for the kernel that reads it.
      plane: floats between y and the recorded gate and up.
    """
    first = weights[0]
    dual = len(weights) == 2
    name, block = tiling.expert_kernel(device.tuning.tiles, weights, tokens)
    if block:
        constants, rows_a_group = tiling.constants(block), block.rows // len(weights)
    else:
        constants = _matmul_constants(device, first.type, first.columns, tokens)
        if dual:
            constants["ROWS"] = max(1, constants["ROWS"] // 2)
        rows_a_group = constants["WG"] // constants["LANES"] * constants["ROWS"]
    kernel = device.kernel(
        name,
        MODE="indexed" if tokens == 1 else "grouped",
        DUAL=dual,
        TYPES=[w.type.name for w in weights],
        **constants,
    )
    params = params_of(
        device,
        stack_words(weights),
        x_vectors=tiling.vectors_of_row(name, first.columns),
        y_stride=first.rows,
        x_div=x_div,
        experts=(first.begin, first.end),
        plane=plane,
        segments=len(weights),
    )
    resources = {0: params, 1: step, 2: first.buffer, 3: rounded if name == "tile_bytes" else x, 4: y}
    if tokens == 1:
        resources[5] = routing["ids"]
    else:
        resources |= {5: routing["tiles"], 6: routing["order"]}
    if dual:
        resources[7] = weights[1].buffer
    dispatch = device.bind(kernel, resources)
    groups = -(-first.rows // rows_a_group)
    follows = "pairs" if tokens == 1 else "pair tiles"
    return Site(dispatch, groups, follows, tokens, nbytes=nbytes_of(weights), taps=taps)


def embed_site(device: Device, table: ExpertBuffer, tokens: Any, x: Any, taps: tuple[Any, ...] = ()) -> Site:
    """Rows of one window of the embedding table; ``table.rows`` counts from ``table.begin``."""
    layout = WORD_FORMATS[table.type]
    kernel = device.kernel("embed", TYPE=table.type.name, WG=device.tuning.vector_workgroup)
    params = device.uniform(
        table.begin,
        table.end,
        table.columns // layout.block,
        table.columns // layout.unit,
        table.columns // 4,
    )
    dispatch = device.bind(kernel, {0: params, 1: table.buffer, 2: tokens, 3: x})
    return Site(dispatch, 1, "tokens", nbytes=device_nbytes(table.type, table.columns), taps=taps)


def _by_token(dispatch: Dispatch, taps: tuple[Any, ...] = ()) -> Site:
    return Site(dispatch, 1, "tokens", taps=taps)


def norm_site(
    device: Device,
    step: Any,
    x: Any,
    delta: Any,
    weights: Any,
    norm: Any,
    h: Any,
    sums: Any,
    *,
    deltas: int,
    weighted: bool,
    width: int,
    eps: float,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``x += sum of deltas``, then ``h = rms_norm(x) * norm``."""
    kernel = device.kernel("norm", WG=device.tuning.vector_workgroup)
    params = device.uniform(deltas, int(weighted), width // 4, eps)
    resources = {0: params, 1: step, 2: x, 3: delta, 4: weights, 5: norm, 6: h, 7: sums}
    return _by_token(device.bind(kernel, resources), taps)


def rope_site(
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
) -> Site:
    """Head norms, RoPE and cache write; ``buffers``: qkv, norms, table, roped, keys, values as 2 to 7."""
    kernel = device.kernel("rope", HEAD_DIM=head_dim, WG=device.tuning.head_workgroup, KV_F16=f16)
    params = device.uniform(heads, kv_heads, capacity, eps)
    dispatch = device.bind(kernel, {0: params, 1: step, **buffers})
    return Site(dispatch, heads + 2 * kv_heads, "tokens", taps=taps)


def _attention_bytes(device: Device, tokens: int, group: int, head_dim: int) -> int:
    """Shared memory of attention.wgsl."""
    lanes = device.tuning.head_workgroup
    of_query = head_dim + ATTENTION_TILE + lanes
    return 4 * group * (tokens * of_query + max(1, 4 * lanes // head_dim) * head_dim)


TILED_QUERIES = 32
"""Of a workgroup of attend_tile.wgsl: query heads of one KV head times tokens."""


def _tiled_bytes(head_dim: int) -> int:
    """Shared memory of attend_tile.wgsl: queries, keys or values, scores, and what their rows share."""
    vectors = TILED_QUERIES * head_dim // 4 + max(64 * 8, 16 * head_dim // 4) + TILED_QUERIES * 17
    return 16 * vectors + 4 * (128 + 2 * TILED_QUERIES)


def _tiled_group(device: Device, per_kv_head: int, head_dim: int) -> int:
    """Query heads that a workgroup of attend_tile.wgsl takes together; 0 where it does not suit."""
    if head_dim % 64 or _tiled_bytes(head_dim) > device.shared_bytes:
        return 0
    return math.gcd(per_kv_head, 8)


def attention_sites(
    device: Device,
    step: Any,
    roped: Any,
    keys: Any,
    values: Any,
    output: Any,
    parts: Any,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    span: int,
    f16: bool,
    tokens: int = 1,
    taps: tuple[Any, ...] = (),
) -> list[Site]:
    """Attention over the cache, by ``tokens`` per workgroup, and the merge of its spans."""
    per_kv_head = heads // kv_heads
    tiled = _tiled_group(device, per_kv_head, head_dim) if tokens > 1 else 0
    if tiled:
        group, tokens = tiled, TILED_QUERIES // tiled
        kernel = device.kernel("attend_tile", HEAD_DIM=head_dim, GROUP=group, KV_F16=f16)
    else:
        group = max(g for g in range(1, device.tuning.heads + 1) if per_kv_head % g == 0)
        while tokens > 1 and _attention_bytes(device, tokens, group, head_dim) > device.shared_bytes:
            tokens //= 2
        kernel = device.kernel(
            "attention",
            HEAD_DIM=head_dim,
            GROUP=group,
            TOKENS=tokens,
            TILE=ATTENTION_TILE,
            WG=device.tuning.head_workgroup,
            KV_F16=f16,
        )
    params = device.uniform(heads, kv_heads, capacity, span, float(head_dim**-0.5))
    attend = device.bind(kernel, {0: params, 1: step, 2: roped, 3: keys, 4: values, 5: output, 6: parts})
    merge = device.bind(
        device.kernel("merge", HEAD_DIM=head_dim, WG=device.tuning.head_workgroup),
        {0: device.uniform(heads, span), 1: step, 2: parts, 3: output},
    )
    return [
        Site(attend, heads // group, "token tiles", tokens, spans=span),
        Site(merge, heads, "tokens", spans=span, merge=True, taps=taps),
    ]


def router_site(
    device: Device,
    step: Any,
    logits: Any,
    probs: Any,
    ids: Any,
    weights: Any,
    replay: Any,
    *,
    experts: int,
    chosen: int,
    taps: tuple[Any, ...] = (),
) -> Site:
    """Softmax, choice of experts and their weights."""
    lanes = min(device.tuning.vector_workgroup, ROUTER_LANES)
    kernel = device.kernel("router", EXPERTS=experts, WG=lanes)
    params = device.uniform(experts, chosen)
    resources = {0: params, 1: step, 2: logits, 3: probs, 4: ids, 5: weights, 6: replay}
    return _by_token(device.bind(kernel, resources), taps)


def group_site(
    device: Device, step: Any, ids: Any, tiles: Any, order: Any, *, experts: int, chosen: int, tokens: int
) -> Site:
    """Tiles of pairs with the same expert."""
    lanes = device.tuning.head_workgroup
    while lanes > 1 and 4 * (lanes + GROUP_WORDS) * experts > device.shared_bytes:
        lanes //= 2
    kernel = device.kernel("group", EXPERTS=experts, TOKENS=tokens, WG=lanes)
    params = device.uniform(chosen)
    return Site(device.bind(kernel, {0: params, 1: step, 2: ids, 3: tiles, 4: order}), 1)


def sample_site(
    device: Device,
    choice: Any,
    step: Any,
    logits: Any,
    seen: Any,
    tokens: Any,
    emitted: Any,
    *,
    sampled: bool,
) -> Site:
    """The next token; ``choice`` is the uniform buffer of sampling parameters."""
    kernel = device.kernel("sample", SAMPLED=sampled, WG=device.tuning.sample_workgroup)
    resources = {0: choice, 1: step, 2: logits, 3: seen, 4: tokens, 5: emitted}
    return Site(device.bind(kernel, resources), 1)
