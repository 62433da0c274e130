"""Every kernel with its parameters: what to bind, and how large its grid is.

A :class:`Site` is one dispatch of the forward pass. Its grid follows from the
number of tokens of a pass, so that one set of sites serves every prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.wgpu_backend.device import Device, Dispatch, Launch
from qwen3_moe_jax.wgpu_backend.layout import WORD_FORMATS, device_nbytes

ATTENTION_TILE = 128
GROUP_SHARED_BYTES = 10 << 10
"""Of the counters of group.wgsl; with three words per expert they stay below the 16 KiB of every adapter."""
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


@dataclass(frozen=True, eq=False)
class Site:
    """One dispatch of a pass.

    Attributes:
      dispatch: the kernel and its resources.
      x: workgroups in x.
      y: what the grid's y follows: "once", "tokens", "token tiles", "pairs", "pair tiles"
        or "head tiles".
      spans: for attention and merge, cache positions per workgroup; 0 otherwise.
      merge: runs only where there is more than one span.
      nbytes: bytes of weights that it reads: of all its matrices, of one expert, or of one token's row.
      taps: stages that can be read after this dispatch.
    """

    dispatch: Dispatch
    x: int
    y: str = "once"
    spans: int = 0
    merge: bool = False
    nbytes: int = 0
    taps: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What grids follow from.

    Attributes:
      tile: tokens per tile of the matrix kernels.
      experts, chosen: E and X.
    """

    tile: int
    experts: int
    chosen: int

    def launch(self, site: Site, position: int, tokens: int, head_rows: int) -> Launch | None:
        """The site's grid for ``tokens`` tokens from ``position``; None where it has nothing to do."""
        y = self._rows(site.y, tokens, head_rows)
        z = -(-(position + tokens) // site.spans) if site.spans else 1
        if site.merge:
            return (site.dispatch, site.x, y, 1) if z > 1 else None
        return site.dispatch, site.x, y, z

    def _rows(self, follows: str, tokens: int, head_rows: int) -> int:
        pairs = tokens * self.chosen
        return {
            "once": 1,
            "tokens": tokens,
            "token tiles": -(-tokens // self.tile),
            "pairs": pairs,
            "pair tiles": max_tiles(pairs, self.experts, self.tile),
            "head tiles": -(-head_rows // self.tile),
        }[follows]


def max_tiles(pairs: int, experts: int, tile: int) -> int:
    """Upper bound on the tiles that group.wgsl makes."""
    return pairs // tile + min(pairs, experts)


def lanes_for(device: Device, type: GGMLType, columns: int) -> int:
    """Lanes that share a row: as many as keep busy."""
    units = columns // WORD_FORMATS[type].unit
    lanes = device.tuning.lanes
    while lanes > 1 and units < FULL_LANES * lanes * -(-units // lanes):
        lanes //= 2
    return lanes


def _matmul_constants(device: Device, type: GGMLType, columns: int, tokens: int) -> dict[str, Any]:
    tuning = device.tuning
    rows = tuning.decode_rows if tokens == 1 else tuning.prefill_rows
    lanes = lanes_for(device, type, columns)
    return {
        "WG": tuning.workgroup,
        "LANES": lanes,
        "ROWS": rows,
        "TOKENS": tokens,
        "SUBGROUPS": device.subgroups,
    }


def _segment_words(segment: Segment, group_begin: int, expert_rows: int = 0) -> list[int]:
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


def dense_site(
    device: Device,
    weights: DenseBuffer,
    x: Any,
    y: Any,
    step: Any,
    *,
    tokens: int,
    y_stride: int,
    head: bool = False,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y[t] = W x[t]``; ``tokens`` a tile, ``head`` starts at the step's head_row."""
    segments = weights.segments
    columns = segments[0].columns
    constants = _matmul_constants(device, segments[0].type, columns, tokens)
    rows_a_group = constants["WG"] // constants["LANES"] * constants["ROWS"]
    types = sorted({s.type for s in segments})
    kernel = device.kernel("matmul", MODE="dense", DUAL=False, TYPES=[t.name for t in types], **constants)
    words, groups = [], 0
    for segment in segments:
        words += _segment_words(segment, groups)
        groups += -(-segment.rows // rows_a_group)
    words += [0] * (24 - len(words))
    params = device.uniform(columns // 4, y_stride, int(head), 1, 0, 0, 0, len(segments), *words)
    dispatch = device.bind(kernel, {0: params, 1: step, 2: weights.buffer, 3: x, 4: y})
    tiles = "head tiles" if head else "token tiles"
    nbytes = sum(device_nbytes(s.type, s.rows * s.columns) for s in segments)
    return Site(dispatch, groups, "once" if tokens == 1 else tiles, nbytes=nbytes, taps=taps)


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
    plane: int = 0,
    taps: tuple[Any, ...] = (),
) -> Site:
    """``y[pair] = W[expert of pair] x[pair / x_div]``, or with two stacks (gate, up) their SwiGLU.

    Args:
      routing: buffers "ids", and for tiles of tokens "tiles" and "order".
      plane: floats between y and the recorded gate and up.
    """
    first = weights[0]
    dual = len(weights) == 2
    constants = _matmul_constants(device, first.type, first.columns, tokens)
    if dual:
        constants["ROWS"] = max(1, constants["ROWS"] // 2)
    rows_a_group = constants["WG"] // constants["LANES"] * constants["ROWS"]
    kernel = device.kernel(
        "matmul",
        MODE="indexed" if tokens == 1 else "grouped",
        DUAL=dual,
        TYPES=[w.type.name for w in weights],
        **constants,
    )
    words = []
    for stack in weights:
        segment = Segment(stack.type, stack.rows, stack.columns)
        words += _segment_words(segment, 0, stack.rows)
    words += [0] * (24 - len(words))
    params = device.uniform(
        first.columns // 4, first.rows, 0, x_div, first.begin, first.end, plane, len(weights), *words
    )
    resources = {0: params, 1: step, 2: first.buffer, 3: x, 4: y}
    if tokens == 1:
        resources[5] = routing["ids"]
    else:
        resources |= {5: routing["tiles"], 6: routing["order"]}
    if dual:
        resources[7] = weights[1].buffer
    dispatch = device.bind(kernel, resources)
    groups = -(-first.rows // rows_a_group)
    nbytes = sum(device_nbytes(w.type, w.rows * w.columns) for w in weights)
    return Site(dispatch, groups, "pairs" if tokens == 1 else "pair tiles", nbytes=nbytes, taps=taps)


def embed_site(device: Device, table: ExpertBuffer, tokens: Any, x: Any) -> Site:
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
    return Site(dispatch, 1, "tokens", nbytes=device_nbytes(table.type, table.columns))


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
    taps: tuple[Any, ...] = (),
) -> list[Site]:
    """Attention over the cache, and the merge of its spans."""
    per_kv_head = heads // kv_heads
    group = max(g for g in range(1, device.tuning.heads + 1) if per_kv_head % g == 0)
    kernel = device.kernel(
        "attention",
        HEAD_DIM=head_dim,
        GROUP=group,
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
        Site(attend, heads // group, "tokens", spans=span),
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
    lanes = min(device.tuning.vector_workgroup, 32)
    kernel = device.kernel("router", EXPERTS=experts, WG=lanes)
    params = device.uniform(experts, chosen)
    resources = {0: params, 1: step, 2: logits, 3: probs, 4: ids, 5: weights, 6: replay}
    return _by_token(device.bind(kernel, resources), taps)


def group_site(
    device: Device, step: Any, ids: Any, tiles: Any, order: Any, *, experts: int, chosen: int, tokens: int
) -> Site:
    """Tiles of pairs with the same expert."""
    lanes = device.tuning.head_workgroup
    while lanes > 1 and 4 * lanes * experts > GROUP_SHARED_BYTES:
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
