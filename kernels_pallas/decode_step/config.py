"""What is fixed when the decode kernel is compiled: shapes, and buffers in global memory."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.kernels_pallas.decode_step import primitives
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Slots, Split
from qwen3_moe_jax.kernels_pallas.decode_step.formats import format_of
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import CHUNK, RANKED
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.names import Primitives
from qwen3_moe_jax.kernels_pallas.decode_step.weights import column_names

WARPGROUPS = 2
PIECE = 1024
"""Columns that one warpgroup multiplies or quantizes at a time: four superblocks."""
SPAN = WARPGROUPS * PIECE
"""Columns that a block multiplies at a time."""
STORE_GROUP = 16
"""Tiles of 8 rows in one store of results: one row per lane."""
MAX_NORMED = 4
"""Sequences that are normed at a time, at most."""
TILES_PER_SUBBLOCK = 4
"""Tiles whose rows are one subblock of the activations that they make."""
PASS_UNIT = 4
"""Experts of one of several passes of down are a multiple of this: widths are multiples of 256, so that the
activations of a pass are whole pieces, and each warpgroup has as many experts."""
MAX_SPLITS = 128


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def spans_of(columns: int) -> int:
    """Spans that take ``columns`` columns."""
    return ceil_div(columns, SPAN)


def padded(columns: int) -> int:
    """Columns of the activations of a matrix, in whole spans."""
    return spans_of(columns) * SPAN


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most ``limit``."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


@dataclass(frozen=True)
class StepConfig:
    """Everything that is fixed when the kernel is compiled; the model's sizes under Hugging Face's names.

    Attributes:
      batch: sequences.
      cache_length: tokens that the cache has room for.
      qkv_types: the types that q, k and v have in any layer, the most frequent first.
      qkv_always: 8-row tiles that have the first of them in every layer.
      o_types, gate_up_types, down_types: the types of those tensors in any layer.
      blocks: one per multiprocessor, all running at once, a multiple of 4; 1 in the interpreter, which has no
        grid barrier.
      splits: parts that attention over one sequence and KV head is split into, at most.
      replay: expert ids are given instead of chosen.
      kernels: "hopper" or "portable", the primitives.
      emulate: the primitives are those of the interpreter.
      prefetches: a warpgroup asks for its first tiles of keys and values before the layer's norm; they have
        room of their own then.
      down_passes: into how many passes a block's experts of down are divided, so that shared memory holds the
        activations of one pass at a time. Results have the same bits with any number.
      lm_head_tiled: whether the matrix of the logits lies in tiles; the embedding's does not.
      first_sequence: where in the cache's batch axis this kernel's sequences begin.
      one_sequence: the "sequences" are tokens of one, one after the other, in the cache's row
        ``first_sequence``; each attends to those before it as it would if they had been decoded before.
      mesh: how the model is split over devices that decode together; heads, each expert's width and the
        vocabulary are then those of one device, ``num_experts`` is that of all.
      gathers: devices have different rows of the head, and all get all logits.
      trace_folder: where the times of each phase are written, or None.
    """

    batch: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    cache_length: int
    rms_norm_eps: float
    qkv_types: tuple[GGMLType, ...]
    qkv_always: int
    o_types: tuple[GGMLType, ...]
    gate_up_types: tuple[GGMLType, ...]
    down_types: tuple[GGMLType, ...]
    lm_head_type: GGMLType
    blocks: int
    splits: int
    cache_dtype: Any = jnp.bfloat16  # int8: with a float32 scale for each position and head
    replay: bool = False
    kernels: str = "hopper"
    emulate: bool = False
    first_sequence: int = 0
    one_sequence: bool = False
    prefetches: bool = False
    down_passes: int = 1
    lm_head_tiled: bool = True
    mesh: Split = ONE_DEVICE
    gathers: bool = False
    trace_folder: str | None = None

    @cached_property
    def prim(self) -> Primitives:
        """The primitives."""
        return primitives.choose(self.kernels, emulate=self.emulate)

    @property
    def tile_dtype(self) -> Any:
        """Of queries, keys and values as attention multiplies them: int8 are exact in float16."""
        return jnp.dtype(jnp.float16 if self.has_scales else self.cache_dtype)

    @property
    def has_scales(self) -> bool:
        """Whether keys and values are int8."""
        return jnp.dtype(self.cache_dtype) == jnp.int8

    @property
    def kv_tile(self) -> int:
        """Tokens of a tile of keys or values: of int8 twice as many, as many bytes."""
        return CHUNK * (2 if self.has_scales else 1)

    @property
    def query_columns(self) -> int:
        """Columns of a KV head's queries in attention's products."""
        return ceil_div(self.group_heads, 8) * 8

    @property
    def attention_signals(self) -> int:
        """How often each block signals in attention."""
        return 2 if self.one_sequence else 1

    @property
    def devices(self) -> int:
        """Devices that decode together."""
        return self.mesh.devices

    @property
    def slots(self) -> Slots:
        """Where the parts of the state lie."""
        return Slots(self.devices, self.down_parts)

    @property
    def shares(self) -> bool:
        """Whether one block quantizes activations for all; at batch 1 each block for itself is quicker."""
        return self.batch > 1

    @property
    def pairs(self) -> int:
        """Pairs of a sequence and one of its experts."""
        return self.batch * self.num_experts_per_tok

    @property
    def padded_batch(self) -> int:
        return ceil_div(self.batch, 4) * 4

    @property
    def group_heads(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_width(self) -> int:
        """Columns of the output projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_tiles(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim // 8

    @property
    def ranks_experts(self) -> bool:
        """Whether both warpgroups rank the experts (``rank_experts``): of one sequence, and not given."""
        return self.batch == 1 and not self.replay and self.padded_experts == RANKED

    @property
    def padded_experts(self) -> int:
        return ceil_div(self.num_experts, 128) * 128

    @property
    def down_parts(self) -> int:
        """Into how many parts of its experts a token's down projection is split, to use all blocks."""
        parts = 1
        while (
            self.hidden_size // 32 * parts * 2 <= self.blocks and self.num_experts_per_tok % (4 * parts) == 0
        ):
            parts *= 2
        return parts

    @property
    def experts_per_part(self) -> int:
        """Experts of a token whose down projections a block adds up."""
        return self.num_experts_per_tok // self.down_parts

    @property
    def down_tiles(self) -> int:
        """Tiles of 32 rows that a block multiplies at a time in down: two in batches, where their sums, one
        for each of a part's experts, have places."""
        return 2 if self.shares and 2 * self.experts_per_part <= STORE_GROUP else 1

    @property
    def down_pass_choices(self) -> list[int]:
        """What ``down_passes`` may be, fewest first."""
        maximum = self.experts_per_part // PASS_UNIT
        return [1, *(n for n in range(2, maximum + 1) if self.experts_per_part % (n * PASS_UNIT) == 0)]

    def row_stride(self, rows: int) -> int:
        """Rows to which a matrix of ``rows`` rows is padded so that blocks store whole groups of tiles."""
        return ceil_div(ceil_div(rows // 8, self.blocks), STORE_GROUP) * STORE_GROUP * self.blocks * 8

    @property
    def qkv_stride(self) -> int:
        """Rows of q, k and v, padded: eight heads are read where a KV head has fewer."""
        return self.row_stride(self.qkv_tiles * 8 + max(8 - self.group_heads, 0) * self.head_dim)

    def format(self, type: GGMLType, tiled: bool = True) -> Any:
        """How weights of this type are read; ``tiled``: where the type is held in tiles at all."""
        return format_of(type, tiled)

    def columns(self) -> dict[str, int]:
        """Columns of the table that says where a layer's weights lie in the stacks."""
        return column_names(len(self.qkv_types))


def scalar_count(c: StepConfig) -> int:
    """Length of :attr:`Operands.scalars_gmem`, padded for one load per lane."""
    return ceil_div(c.num_hidden_layers * len(c.columns()) + 2 * c.batch + (c.devices > 1), 128) * 128


def state_shape(c: StepConfig) -> tuple[int, ...]:
    """Residual stream and the parts that are added to it (:class:`Slots`), as the kernel's state operand."""
    return (c.slots.number, c.batch, c.row_stride(padded(c.hidden_size)) // 32, 2, 4, 4)


class ExpertTiles(NamedTuple):
    """Tiles of gate and up per block: ``padded`` in all, ``used`` per store group, ``store_groups``."""

    padded: int
    used: int
    store_groups: int


def expert_tiles(c: StepConfig) -> ExpertTiles:
    """Tiles of the gate and up projections that one block takes.

    Where activations are shared, four neighbouring ones are a subblock of one expert's SwiGLU.
    """
    each = TILES_PER_SUBBLOCK if c.shares else 1
    tiles = ceil_div(c.pairs * c.moe_intermediate_size // 8, c.blocks * each) * each
    groups = ceil_div(tiles, STORE_GROUP)
    used = ceil_div(ceil_div(tiles, groups), each) * each
    return ExpertTiles(groups * used + STORE_GROUP, used, groups)


class Quantized(NamedTuple):
    """Quantized activations of all sequences: two int8 parts, scales of 32 and sums of 16.

    Attributes:
      words: int32 [B, 2 parts, superblocks, 4 groups, 2 subblocks, 2 halves, 4].
      scale: float32 [B, superblocks, 4, 2].
      sums: int32 [B, superblocks, 4, 2, 2].
    """

    words: Any
    scale: Any
    sums: Any

    def of(self, b: Any) -> "Quantized":
        """Those of sequence b."""
        return Quantized(*(ref.at[b] for ref in self))


def quantized_types(batch: int, superblocks: int) -> Quantized:
    """The types of :class:`Quantized`."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
    return Quantized(
        words=array(jnp.int32, 2, superblocks, 4, 2, 2, 4),
        scale=array(jnp.float32, superblocks, 4, 2),
        sums=array(jnp.int32, superblocks, 4, 2, 2),
    )


class Operands(NamedTuple):
    """What the kernel reads, in global memory; state and cache are also written.

    Attributes:
      scalars_gmem: int32 [:func:`scalar_count`], the table, positions, which sequences are active, and on a
        mesh the device's number.
      rope_gmem: float32 [B, 2, head_dim / 2], cos and sin.
      replay_ids_gmem: int32 [L, B, X] where experts are given.
      input_norm_gmem, post_norm_gmem: float32 [L, D / 32, 2, 4, 4]; final_norm_gmem without L.
      q_norm_gmem, k_norm_gmem: float32 [L, head_dim].
      router_gmem: float32, float16 or bfloat16 [L, E, D / 32, 2, 4, 4].
      weights_gmem: for each role, one dictionary of arrays per type.
      state_gmem: float32 [:func:`state_shape`].
      k_cache_gmem, v_cache_gmem: [L, batch, S, K, head_dim].
      k_scale_gmem, v_scale_gmem: float32 [L, batch, S, K] where these are int8, else None.
    """

    scalars_gmem: Any
    rope_gmem: Any
    replay_ids_gmem: Any
    input_norm_gmem: Any
    post_norm_gmem: Any
    q_norm_gmem: Any
    k_norm_gmem: Any
    final_norm_gmem: Any
    router_gmem: Any
    weights_gmem: Any
    state_gmem: Any
    k_cache_gmem: Any
    v_cache_gmem: Any
    k_scale_gmem: Any = None
    v_scale_gmem: Any = None


class Outputs(NamedTuple):
    """Results and the buffers through which blocks hand over activations, in global memory.

    Attributes:
      logits_gmem: float32 [B, tiles, blocks, 8]: row (i * blocks + block) * 8 + j; if gathered, of all.
      expert_ids_gmem: int32 [L, B, X].
      qkv_gmem: float32 [B, heads, 2, head_dim / 2].
      attention_gmem: float32 [B, heads, head_dim], in whole spans.
      part_gmem: float32 [B, K, splits, heads per KV head, head_dim], of splits.
      part_stats_gmem: float32 [B, K, 2, heads per KV head, MAX_SPLITS], a split's largest score and its sum.
      router_logits_gmem: float32 [warpgroups, B, E], both padded, without the norm's scale.
      swiglu_gmem: float32 [tiles, blocks, 8] of one sequence, else None.
      hidden_gmem, attended_gmem, swiglu_quantized_gmem: of batches, what one block quantizes for all:
        after a norm, after attention, after SwiGLU; else None.
    """

    logits_gmem: Any
    expert_ids_gmem: Any
    qkv_gmem: Any
    attention_gmem: Any
    part_gmem: Any
    part_stats_gmem: Any
    router_logits_gmem: Any
    swiglu_gmem: Any = None
    hidden_gmem: Any = None
    attended_gmem: Any = None
    swiglu_quantized_gmem: Any = None


def output_types(c: StepConfig) -> Outputs:
    """The types of :class:`Outputs`."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    heads, tiles = c.qkv_stride // c.head_dim, c.row_stride(c.vocab_size) // (8 * c.blocks)
    out = Outputs(
        logits_gmem=f32(*[c.devices] * c.gathers, c.batch, tiles, c.blocks, 8),
        expert_ids_gmem=jax.ShapeDtypeStruct(
            (c.num_hidden_layers, c.batch, c.num_experts_per_tok), jnp.int32
        ),
        qkv_gmem=f32(c.batch, heads, 2, c.head_dim // 2),
        attention_gmem=f32(c.batch, padded(c.attention_width) // c.head_dim, c.head_dim),
        part_gmem=f32(c.batch, c.num_key_value_heads, c.splits, c.group_heads, c.head_dim),
        part_stats_gmem=f32(c.batch, c.num_key_value_heads, 2, c.group_heads, MAX_SPLITS),
        router_logits_gmem=f32(WARPGROUPS, c.padded_batch, c.padded_experts),
    )
    if not c.shares:
        # Down reads whole pieces: the last one of a part may go over the end of the last expert.
        read = ceil_div(c.pairs * c.moe_intermediate_size + PIECE, 8 * c.blocks)
        return out._replace(swiglu_gmem=f32(max(expert_tiles(c).padded, read), c.blocks, 8))
    quantized = lambda width: quantized_types(c.batch, width // SUPERBLOCK)
    return out._replace(
        hidden_gmem=quantized(padded(c.hidden_size)),
        attended_gmem=quantized(padded(c.attention_width)),
        swiglu_quantized_gmem=quantized(c.num_experts_per_tok * c.moe_intermediate_size),
    )
